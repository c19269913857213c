"""Every small fault that can be made in a source file: one change of its syntax tree at a time."""

import ast
import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Iterator

# Calls through these names are of functions; through any other, of an object's method.
_MODULES = {"F", "checkpoint_policies", "contextlib", "dataclasses", "functools", "jax", "jnp"}
_MODULES |= {"flash", "math", "nn", "optax", "sharding", "torch"}

_TOKEN = re.compile(r"\d[\w.]*|\w+|[^\w\s]")

_SWAPPED: dict[type, tuple[type, ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.BitXor: (ast.BitOr,),
    ast.BitOr: (ast.BitXor,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file with one change; `scope` is the function or class that holds it."""

    file: str
    scope: str
    line: int
    operator: str
    source: str = dataclasses.field(repr=False)
    diff: str

    @property
    def code(self) -> str:
        """The line that was changed, as it was."""
        return next(line[1:] for line in self.diff.splitlines() if line.startswith("-"))

    @functools.cached_property
    def change(self) -> str:
        """What is gone -> what came, in tokens: of a call of many lines only what differs."""
        lines = self.diff.replace("'", '"').splitlines()  # `ast` has quotes of its own
        before, after = (
            _TOKEN.findall("\n".join(line[1:] for line in lines if line[0] == sign))
            for sign in "-+"
        )
        edits = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        gone = [token for kind, i, j, *_ in edits if kind != "equal" for token in before[i:j]]
        came = [token for kind, *_, i, j in edits if kind != "equal" for token in after[i:j]]
        return f"{' '.join(gone)} -> {' '.join(came)}"


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """All of them; `low_precision` and `no_gradient` are names that who runs them must define."""
    seen = {source}
    for operator, scope, edits in _changes(ast.parse(source)):
        changed = _edited(source, edits)
        if changed not in seen:
            seen.add(changed)
            diff = "\n".join(_difference(source, changed))
            line = min(node.lineno for node, _ in edits)  # type: ignore[attr-defined]
            yield Mutant(file, scope, line, operator, changed, diff)


def _difference(before: str, after: str) -> Iterator[str]:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return (line for line in lines if not line.startswith(("---", "+++", "@@")))


Edit = tuple[ast.AST, str]  # a node, and the text that takes its place


def _edited(source: str, edits: list[Edit]) -> str:
    lines = source.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    text = source.encode()
    for node, new in sorted(edits, key=lambda edit: -edit[0].lineno):  # type: ignore[attr-defined]
        start = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        text = text[:start] + new.encode() + text[end:]
    return text.decode()


def _changes(tree: ast.Module) -> Iterator[tuple[str, str, list[Edit]]]:
    """(operator, scope, edits) of each change."""
    for node, scope in _nodes(tree, ""):
        for operator, make in OPERATORS.items():
            for edits in make(node):
                yield operator, scope, edits


def _nodes(node: ast.AST, scope: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node that is run, with its scope: no annotation, decorator, import or docstring."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and scope.count(".") < 1:
        scope = f"{scope}.{node.name}".strip(".")
    yield node, scope
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            is_strict = isinstance(child, ast.keyword) and child.arg == "strict"
            if is_strict:  # zip's: both are of one length
                continue
            is_run = isinstance(child, ast.AST) and not isinstance(child, ast.Import)
            if is_run and not isinstance(child, ast.ImportFrom) and not _is_prose(child):
                yield from _nodes(child, scope)


def _is_prose(node: ast.AST) -> bool:
    """A docstring."""
    is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_string and isinstance(node.value.value, str)  # type: ignore[attr-defined]


# ---- the operators ------------------------------------------------------------------------------

Edits = Iterator[list[Edit]]


def _instead(node: ast.AST, **fields: object) -> list[Edit]:
    """The node with other fields, in parentheses."""
    copy = type(node)(**{**dict(ast.iter_fields(node)), **fields})
    return [(node, f"({ast.unparse(ast.copy_location(copy, node))})")]


def _operators(node: ast.AST) -> Edits:
    if isinstance(node, ast.BinOp | ast.BoolOp):
        for other in _SWAPPED.get(type(node.op), ()):
            yield _instead(node, op=other())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield _instead(node, left=node.right, right=node.left)
    if isinstance(node, ast.UnaryOp):
        yield [(node, f"({ast.unparse(node.operand)})")]
    if isinstance(node, ast.AugAssign):
        for other in _SWAPPED.get(type(node.op), ()):
            new = ast.AugAssign(node.target, other(), node.value)
            yield [(node, ast.unparse(ast.copy_location(new, node)))]


def _comparisons(node: ast.AST) -> Edits:
    if isinstance(node, ast.Compare):
        for other in _SWAPPED.get(type(node.ops[0]), ()):
            yield _instead(node, ops=[other(), *node.ops[1:]])


def _constants(node: ast.AST) -> Edits:
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    if isinstance(value, bool):
        yield [(node, str(not value))]
    elif isinstance(value, int):
        yield from ([(node, str(other))] for other in (value + 1, value - 1) if other >= 0)
    elif isinstance(value, float):
        yield [(node, str(value * 1.1 if value else 1.0))]


def _arguments(node: ast.AST) -> Edits:
    """Dropped, so that the default counts, or the first two exchanged."""
    if not isinstance(node, ast.Call):
        return
    for keyword in node.keywords:
        if keyword.arg == "strict":  # zip's: both are of one length
            continue
        yield _instead(node, keywords=[other for other in node.keywords if other is not keyword])
    if len(node.args) > 1:
        yield _instead(node, args=node.args[:-1])
        first, second, *rest = node.args
        if ast.unparse(first) != ast.unparse(second) and not _is_symmetric(node):
            yield _instead(node, args=[second, first, *rest])


# Of two arguments; max and min are Python's, transpose of two axes PyTorch's.
_SYMMETRIC = {"swapaxes", "promote_types", "maximum", "minimum", "transpose"}


def _is_symmetric(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    is_known = name in ("max", "min") or name.rpartition(".")[2] in _SYMMETRIC
    return len(call.args) == 2 and is_known


def _calls(node: ast.AST) -> Edits:
    """Left out: what is left is the first argument, or the object of the method."""
    if not isinstance(node, ast.Call):
        return
    function = node.func
    is_method = isinstance(function, ast.Attribute) and not _is_of_module(function)
    if is_method:
        yield [(node, f"({ast.unparse(function.value)})")]  # type: ignore[attr-defined]
    elif node.args and not isinstance(node.args[0], ast.Starred):
        yield [(node, f"({ast.unparse(node.args[0])})")]


def _is_of_module(function: ast.Attribute) -> bool:
    root: ast.AST = function.value
    while isinstance(root, ast.Attribute):
        root = root.value
    return isinstance(root, ast.Name) and root.id in _MODULES


_SIMPLE = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)


def _body(node: ast.AST) -> list[ast.stmt]:
    """The statements of a function or a branch."""
    body = getattr(node, "body", None)
    is_run = isinstance(body, list) and not isinstance(node, ast.Module | ast.ClassDef)
    return [statement for statement in body or [] if not _is_prose(statement)] if is_run else []


def _deleted(node: ast.AST) -> Edits:
    for statement in _body(node):
        if isinstance(statement, (*_SIMPLE, ast.If, ast.For)):
            yield [(statement, "pass")]


def _exchanged(node: ast.AST) -> Edits:
    for one, other in itertools.pairwise(_body(node)):
        if isinstance(one, _SIMPLE) and isinstance(other, _SIMPLE) and _in_order(one, other):
            yield [(one, ast.unparse(other)), (other, ast.unparse(one))]


def _in_order(one: ast.stmt, other: ast.stmt) -> bool:
    """Whether they need one: two assignments, where one sets a name that the other has.

    An assignment of a plain value and a call, where they have a name in common.
    """
    assigned = [each for each in (one, other) if isinstance(each, ast.Assign)]
    if len(assigned) == 2:
        return bool(_set_by(one) & _names(other) or _set_by(other) & _names(one))
    if len(assigned) == 1 and any(isinstance(each, ast.Expr) for each in (one, other)):
        kinds = ast.Call | ast.Subscript  # what a call elsewhere may change
        is_plain = not any(isinstance(node, kinds) for node in ast.walk(assigned[0].value))
        return not is_plain or bool(_names(one) & _names(other))
    return True


def _set_by(statement: ast.Assign) -> set[str]:
    return set().union(*(_names(target) for target in statement.targets)) - {"self"}


def _names(node: ast.AST) -> set[str]:
    """`a` and `a.b`."""
    return {ast.unparse(n) for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)}


def _branches(node: ast.AST) -> Edits:
    """Forced to either side."""
    if isinstance(node, ast.If | ast.IfExp):
        yield [(node.test, "True")]
        yield [(node.test, "False")]
    if isinstance(node, ast.comprehension):
        yield from ([(test, "True")] for test in node.ifs)


def _slices(node: ast.AST) -> Edits:
    """A bound moved by one, or left out."""
    if not isinstance(node, ast.Slice):
        return
    lower, upper, step = (
        part and ast.unparse(part) for part in (node.lower, node.upper, node.step)
    )
    end = f":{step}" if step else ""
    yield [(node, f"{f'({lower}) + 1' if lower else '1'}:{upper or ''}{end}")]
    yield [(node, f"{lower or ''}:{f'({upper}) - 1' if upper else '-1'}{end}")]
    if lower:
        yield [(node, f":{upper or ''}{end}")]
    if upper:
        yield [(node, f"{lower or ''}:{end}")]


def _values(wrapper: str, node: ast.AST) -> Edits:
    """What is assigned or returned, through a function."""
    if isinstance(node, ast.Assign | ast.Return) and node.value is not None:
        value = node.value
        parts = value.elts if isinstance(value, ast.Tuple) else [value]
        for part in parts:
            if not isinstance(part, ast.Constant | ast.Starred):
                yield [(part, f"{wrapper}({ast.unparse(part)})")]


OPERATORS = {
    "operator": _operators,
    "comparison": _comparisons,
    "constant": _constants,
    "argument dropped or swapped": _arguments,
    "call left out": _calls,
    "statement deleted": _deleted,
    "statements exchanged": _exchanged,
    "branch forced": _branches,
    "slice by one": _slices,
    "rounded to float32": lambda node: _values("low_precision", node),
    "gradient stopped": lambda node: _values("no_gradient", node),
}
