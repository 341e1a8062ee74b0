"""A package as `llmc compile --target cuda:…` leaves it, cubins, launcher and all, loaded where only a driver is.

The fake driver reads what ptxas and LLVM wrote (architecture, function, the width of every parameter), checks that each
argument points into device memory, and computes nothing: what is shown is the package, not its numbers.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from llmc.backends.triton.launcher import build_launcher
from llmc.options import Limits
from llmc.runtime.errors import ModelError
from llmc.runtime.load import load_model
from tests import tiny_models
from tests.conftest import Compile
from tests.runtime.cuda.fake import FakeCuda
from tests.runtime.isolated import run_isolated

pytest.importorskip("triton", reason="cubins are compiled by Triton")

SCRIPT = """
import ctypes, importlib
package = importlib.import_module(os.environ["PACKAGE"])
model = package.load()
text = model.generate([[1, 2, 3], [4]], 6, ignore_eos=True)
loaded = model.info["loaded"]
print(json.dumps({
    "seen": [x for x in seen if x != "load None"],
    "tokens": [c.token_ids for c in text],
    "variant": loaded["variant"],
    "code": loaded["code"],
    "launcher": loaded["launcher"],
    "kernels": model.info["kernels"],
}))
model.close()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, compiled: Compile) -> Path:
    model = tiny_models.make_model("llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    folder = tiny_models.save(model.bfloat16(), tmp_path_factory.mktemp("tiny") / "model")
    return compiled(folder, target="cuda:sm_80,sm_90", quant="q4", limits=Limits(tokens=32, sequences=2, outputs=2))


@pytest.mark.parametrize(
    ("capability", "code"),
    [("8.6", "sm_80, cubin"), ("9.0", "sm_90, cubin"), ("10.0", "sm_80, PTX, compiled by the driver")],
)
def test_a_compiled_package_stands_alone(tiny: Path, capability: str, code: str, fake_driver: FakeCuda) -> None:
    """Nothing of ours, no child process, nothing written, nothing compiled but, on a later chip, the driver's PTX."""
    found = run_isolated(
        SCRIPT,
        tiny.parent,
        PACKAGE=tiny.name,
        LD_LIBRARY_PATH=str(fake_driver.path.parent),
        FAKE_CUDA_CAPABILITY=capability,
    )
    native = build_launcher(tiny.parent) is not None
    assert found["seen"] == ["load libcuda.so.1", *(["load launcher.so"] if native else [])]
    assert f"{found['variant']}, {found['code']}" == code
    assert [len(ids) for ids in found["tokens"]] == [6, 6]
    assert len(found["kernels"]) >= 6


def test_every_kernel_takes_what_the_plan_gives_it(tiny: Path, cuda: FakeCuda) -> None:
    """A launch with another number of arguments, or one that is no address on the device, fails in the fake driver."""
    plan: dict[str, Any] = json.loads((tiny / "plan-sm_90.json").read_text())
    steps = {n: {b["tokens"]: len(b["launches"]) for b in e["buckets"]} for n, e in plan["entries"].items()}
    with load_model(tiny) as model:
        cuda.reset()
        model.generate([1, 2, 3], 4, ignore_eos=True)
        launches = cuda.launches("replayed")
        assert cuda.launches("eager") == []
    assert len(launches) == steps["prefill"][16] + 3 * steps["decode"][1]
    kernels = json.loads((tiny / "kernels-sm_90.json").read_text())
    taken = {found["function"]: found["arguments"] + 2 for found in kernels.values()}
    for launch in launches:
        assert len(launch.arguments) == taken[launch.name]


def test_text_is_carried_where_later_gpus_can_use_it(tiny: Path) -> None:
    """PTX for sm_90a is refused by every other architecture, so that it would only be weight."""
    kinds = {}
    for name in ("sm_80", "sm_90"):
        with zipfile.ZipFile(tiny / f"kernels-{name}.zip") as archive:
            kinds[name] = {Path(member).suffix for member in archive.namelist()}
            texts = [archive.read(member) for member in archive.namelist() if member.endswith(".ptx")]
            assert all(b".target sm_80\n" in text for text in texts)
    assert kinds == {"sm_80": {".cubin", ".ptx"}, "sm_90": {".cubin"}}


@pytest.mark.parametrize("capability", ["9.3", "10.3"])
def test_exact_code_is_refused_elsewhere(
    tiny: Path, tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    """The manifest says so before the driver is asked; and where a manifest did not, the driver refuses the cubin."""
    package = shutil.copytree(tiny, tmp_path / tiny.name)
    manifest = json.loads((package / "manifest.json").read_text())
    only = manifest["target"]["variants"] = manifest["target"]["variants"][1:]
    assert [(v["name"], v["exact"]) for v in only] == [("sm_90", True)]
    monkeypatch.setenv("FAKE_CUDA_CAPABILITY", capability)
    (package / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"holds sm_90 \(and no later one\): compile it for cuda:sm_"):
        load_model(package)
    if capability == "9.3":
        only[0]["exact"] = False
        (package / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ModelError, match="does not take this code"):
            load_model(package)
