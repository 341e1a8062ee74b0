"""What `make demo` does: compile examples/picocode into out/picocode, run it, and import it from Python."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LLMC = str(Path(sys.executable).parent / "llmc")
PROMPT = "def fibonacci(n):\n"
# In a process of its own, started beside the package: nothing of the compiler is imported.
IMPORT = f"""
import sys
import picocode
model = picocode.load()
completion = model.generate({PROMPT!r}, max_new_tokens=16)
print(repr(completion.text))
print("compiler modules imported:", sorted({{"llmc", "tvm", "torch"}} & sys.modules.keys()) or "none")
"""


def run(shown: str, command: list[str], folder: Path = REPOSITORY) -> None:
    """Show a command, then run it; the demonstration ends where one fails."""
    print(f"\n$ {shown}", flush=True)
    done = subprocess.run(command, cwd=folder, check=False)
    if done.returncode:
        sys.exit(f"demo: the command above failed with exit status {done.returncode}")


def main() -> None:
    """Compile, run, import."""
    for arguments in (
        ["compile", "examples/picocode", "-o", "out/picocode", "--quant", "q4", "--force"],
        ["run", "out/picocode", "-p", PROMPT, "-n", "48"],
        ["verify", "out/picocode", "--against", "examples/picocode"],
        ["bench", "out/picocode", "--prefill", "256", "--decode", "128"],
    ):
        run(shlex.join(["llmc", *arguments]), [LLMC, *arguments])
    run(f"cd out && python - <<'END'{IMPORT}END", [sys.executable, "-c", IMPORT], REPOSITORY / "out")


if __name__ == "__main__":
    main()
