"""Chat templates: jinja2's immutable sandbox, with the bounds of `template_limits` worked into every template.

Before a template is compiled its syntax tree is rewritten: each loop turn and macro call counts itself, and the result
of every operation that can make a value (`~`, lists, filters, calls, `{% set %}` blocks) is measured. What could make
an enormous value in a single operation is bounded beforehand; a few filters and methods that only pad are not there.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

from .errors import ModelError
from .template_limits import MAX_LENGTH, MAX_TEMPLATE, Budget, TemplateLimit

_SAFE_JINJA2 = (3, 1, 6)
_NO_FILTERS = ("center", "filesizeformat", "pprint", "urlize", "wordwrap", "xmlattr")
_NO_METHODS = {"center", "expandtabs", "ljust", "rjust", "translate", "zfill", "encode", "decode"}


class Template:
    """A compiled chat template. Not for use by two threads at once.

    Raises `ModelError` when jinja2 is absent, and for a template that is no jinja2 or too long.
    """

    def __init__(self, source: str) -> None:
        try:
            from importlib import metadata  # not at the top: it takes longer to import than all of the runtime

            import jinja2
        except ImportError as error:
            raise ModelError(
                "chat needs the package jinja2: install it, or use generate with the text itself"
            ) from error
        found = tuple(int(part) for part in metadata.version("jinja2").split(".")[:3] if part.isdigit())
        if found < _SAFE_JINJA2:
            needed = ".".join(map(str, _SAFE_JINJA2))
            raise ModelError(
                f"chat needs jinja2 {needed} or newer: the sandbox of {metadata.version('jinja2')} has holes"
            )
        if len(source) > MAX_TEMPLATE:
            raise ModelError(f"the chat template has {len(source)} characters, expected at most {MAX_TEMPLATE}")
        self._error = jinja2.TemplateError
        self._security_error = jinja2.exceptions.SecurityError
        self._budget = Budget()
        environment = _environment(self._budget)
        try:
            self._template = environment.from_string(_measured(environment.parse(source)))
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise ModelError(f"the chat template is not valid: {error}") from error

    def render(self, values: dict[str, Any]) -> str:
        """The text. Raises `ValueError` for values that the template refuses, `ModelError` where it meets a bound."""
        self._budget.start()
        parts, length = [], 0
        try:
            for part in self._template.generate(values):
                self._budget.tick()
                parts.append(part)
                length += len(part)
                if length > MAX_LENGTH:
                    raise TemplateLimit(f"writes more than {MAX_LENGTH} characters")
        except (TemplateLimit, self._security_error, RecursionError, MemoryError) as error:
            raise ModelError(f"the chat template was stopped: it {error}") from error
        except (self._error, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return "".join(parts)


def _environment(budget: Budget) -> Any:
    """jinja2's environment as transformers sets it up for chat templates, with a budget."""
    import jinja2
    from jinja2 import ext, filters, sandbox, utils

    class Generation(ext.Extension):
        """`{% generation %}`, which marks what an assistant said: its body, as it is."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own form

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(utils.Namespace):
        """jinja2's, but for its text, which would write out all that it holds."""

        def __repr__(self) -> str:
            return "<Namespace>"

    class Limited(sandbox.ImmutableSandboxedEnvironment):
        """The sandbox with the budget's checks before operators and methods."""

        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def tick(self) -> None:
            budget.tick()

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.check_operator(operator, left, right)
            return budget.measured(super().call_binop(context, operator, left, right))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _NO_METHODS)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                budget.check_format(value.__self__)
            return wrapped

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
            if isinstance(owner, str) and name == "join" and len(args) == 1:
                return budget.join(owner, args[0])
            if isinstance(owner, str) and name == "replace":
                budget.check_replace(owner, *args)
            return super().call(__context, __obj, *args, **kwargs)

    @jinja2.pass_environment
    def join(environment: Any, value: Any, d: Any = "", attribute: Any = None) -> str:
        return budget.join(
            d, value if attribute is None else map(filters.make_attrgetter(environment, attribute), value)
        )

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    # not optimized: constants would be folded, and so evaluated, while the template is compiled
    environment = Limited(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[Generation, ext.loopcontrols]
    )
    for name in _NO_FILTERS:
        del environment.filters[name]
    checks: dict[str, Callable[..., None]] = {
        "batch": budget.check_group,
        "format": budget.check_format,
        "indent": budget.check_indent,
        "replace": budget.check_replace,
        "round": budget.check_round,
        "slice": budget.check_group,
        "sum": budget.check_sum,
    }
    environment.filters |= {name: _guarded(environment.filters[name], check) for name, check in checks.items()}
    environment.filters |= {"join": join, "measured": budget.measured, "tojson": _guarded(_to_json, budget.check_json)}
    del environment.globals["lipsum"]
    environment.globals |= {
        "namespace": Namespace,
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment


def _measured(tree: Any) -> Any:
    """The template's syntax tree with the counting and measuring in it."""
    from jinja2 import nodes, visitor

    def measure(node: Any) -> Any:
        return nodes.Filter(node, "measured", [], [], None, None)

    makers = (nodes.List, nodes.Dict, nodes.Tuple, nodes.Concat, nodes.Call, nodes.Filter)

    def unmeasurable(node: Any) -> bool:
        # the targets of an assignment, and the filter of a block, which stands for the block's text
        return getattr(node, "ctx", "load") != "load" or (isinstance(node, nodes.Filter) and node.node is None)

    class Measure(visitor.NodeTransformer):
        """Visits children first."""

        def generic_visit(self, node: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(node, nodes.CallBlock):  # its call has to stay one
                super().generic_visit(node.call)
                node.defaults = [self.visit(item) for item in node.defaults]
                node.body = [self.visit(item) for item in node.body]
            else:
                super().generic_visit(node, *args, **kwargs)
            if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
                tick: Any = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(tick).set_lineno(node.lineno))
            elif isinstance(node, nodes.AssignBlock | nodes.FilterBlock):
                node.filter = measure(node.filter)
            elif isinstance(node, makers) and not unmeasurable(node):
                return measure(node).set_lineno(node.lineno)
            return node

    return Measure().visit(tree)


def _guarded(function: Any, check: Callable[..., None]) -> Any:
    """A filter whose arguments are checked first; jinja2 passes its own first argument to those that ask for one."""
    passed = getattr(function, "jinja_pass_arg", None)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        check(*args[0 if passed is None else 1 :], **kwargs)
        return function(*args, **kwargs)

    if passed is not None:
        guarded.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return guarded


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # not jinja2's, which escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
