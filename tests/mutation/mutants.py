"""Mutants: statements drawn at random from the sources, each with one change.

A statement is code that has an effect: not a docstring, import, annotation, type alias or text of an error. Of a
compound statement only the header counts (`if x > 3:`), since its body consists of statements. A mutant replaces one
node of the syntax tree, and its text parses to exactly that tree.
"""

import ast
import copy
import difflib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise

_OPERATORS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_PAIRS = (
    ("min", "max"), ("any", "all"), ("minimum", "maximum"), ("argmin", "argmax"), ("zeros", "ones"), ("floor", "ceil"),
    ("zeros_like", "ones_like"), ("logical_and", "logical_or"), ("startswith", "endswith"),
)  # fmt: skip
_OTHER_FUNCTION = dict(_PAIRS) | {second: first for first, second in _PAIRS}
_OMITTED = frozenset({"abs", "exp", "log", "log1p", "reversed", "softmax", "log_softmax", "sqrt", "stop_gradient"})
"""Functions whose call may be replaced by their argument."""
_SYMMETRIC = frozenset({"isinstance", "logical_and", "logical_or", "max", "maximum", "min", "minimum", "print"})
"""Functions whose arguments are not swapped, since that changes nothing, or only leads to a wrong type."""
_CRUDE = frozenset({"arguments", "nothing returned"})
"""Kinds of changes that mostly lead to a wrong type."""

Identity = tuple[str, str, str, str]
"""File, function, and the changed lines before and after."""
Change = tuple[str, ast.AST, ast.AST]
"""Kind, the node to replace, and its replacement."""


@dataclass(frozen=True)
class Statement:
    """A statement and its location."""

    file: str
    function: str
    """Qualified name of the function or class around it; empty at the top of a module."""
    runs_at_import: bool
    node: ast.stmt
    module: ast.Module
    """Syntax tree of the whole file."""
    source: str
    """Text of the whole file."""

    @property
    def lines(self) -> range:
        """Line numbers of the statement, without its body."""
        body = getattr(self.node, "body", None)
        end = body[0].lineno - 1 if body else self.node.end_lineno or 0
        return range(self.node.lineno, max(end, self.node.lineno) + 1)


@dataclass(frozen=True)
class Mutant:
    """A statement with one change."""

    statement: Statement
    kind: str
    text: str
    """Text of the whole file with the change."""

    @property
    def diff(self) -> str:
        """Unified diff of the change."""
        file, texts = self.statement.file, (self.statement.source.splitlines(), self.text.splitlines())
        return "\n".join(difflib.unified_diff(*texts, f"a/{file}", f"b/{file}", n=1, lineterm=""))

    @property
    def key(self) -> tuple[str, int, str]:
        """File, line and diff, which identify the mutant as long as its file does not change."""
        return self.statement.file, self.statement.node.lineno, self.diff

    @property
    def identity(self) -> Identity:
        """File, function, and the changed lines before and after, which identify the mutant even if lines move."""
        changed = self.diff.splitlines()[2:]
        before, after = ("\n".join(line[1:].strip() for line in changed if line[0] == sign) for sign in "-+")
        return self.statement.file, self.statement.function, before, after


def statements(file: str, source: str) -> list[Statement]:
    """Statements of a file that can be changed, in the order of their lines."""
    module = ast.parse(source)

    def walk(body: list[ast.stmt], function: str, at_import: bool) -> Iterator[Statement]:
        for node in body:
            if _has_no_effect(node):
                continue
            yield Statement(file, function, at_import, node, module, source)
            is_function = isinstance(node, ast.FunctionDef)
            inner = f"{function}.{node.name}".lstrip(".") if is_function or isinstance(node, ast.ClassDef) else function
            for part in (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ())):
                for name in ("body", "orelse", "finalbody"):
                    yield from walk(getattr(part, name, []), inner, at_import and not is_function)

    return [found for found in walk(module.body, "", True) if changes(found.node)]


def _has_no_effect(node: ast.stmt) -> bool:
    """Whether a statement is only for readers or type checkers, or only runs a module as a program."""
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(ast.Constant()):
            return True
        case ast.If(test):
            return ast.unparse(test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        case ast.ClassDef():
            return any(ast.unparse(base).split("[")[0].endswith("Protocol") for base in node.bases)
        case ast.Assign([ast.Name(name)]):  # type aliases are named LikeThis, constants LIKE_THIS
            return name.startswith("__") or (name.strip("_")[:1].isupper() and not name.isupper())
    return False


def draw_mutants(sources: Mapping[str, str], seed: int) -> Iterator[Mutant]:
    """One mutant of every statement, in a random order; the kind of its change, then its node, are drawn as well.

    Crude kinds are used only for statements without another kind, since the wrong type that they lead to is mostly
    noticed anyway.
    """
    drawn = [found for file, source in sorted(sources.items()) for found in statements(file, source)]
    random.Random(seed).shuffle(drawn)
    for statement in drawn:
        rng = random.Random(f"{seed} {statement.file} {statement.node.lineno}")
        possible = changes(statement.node)
        kinds = sorted({kind for kind, *_ in possible})
        rng.shuffle(kinds)
        kinds.sort(key=_CRUDE.__contains__)
        rng.shuffle(possible)
        mutants = (mutant_of(statement, change) for change in sorted(possible, key=lambda one: kinds.index(one[0])))
        yield from islice(filter(None, mutants), 1)


def mutant_of(statement: Statement, change: Change) -> Mutant | None:
    """The statement with one node replaced; None if nothing changes, or if the text parses to another tree.

    The latter happens in some f-strings.
    """
    kind, old, new = change
    wanted = ast.dump(copy.deepcopy(statement.module, {id(old): new}))
    if wanted == ast.dump(statement.module):
        return None
    lines = statement.source.encode().splitlines(keepends=True)  # columns count bytes
    start, end = (
        sum(map(len, lines[: line - 1])) + column
        for line, column in ((old.lineno, old.col_offset), (old.end_lineno, old.end_col_offset))
    )
    data, written = b"".join(lines), ast.unparse(new)
    for text in (written, f"({written})"):
        candidate = (data[:start] + text.encode() + data[end:]).decode()
        try:
            if ast.dump(ast.parse(candidate)) == wanted:
                return Mutant(statement, kind, candidate)
        except SyntaxError:
            continue
    return None


def changes(node: ast.stmt) -> list[Change]:
    """All possible changes of a statement, or of the header of a compound one."""
    found: list[Change] = []
    match node:
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Assert():
            found.append(("dropped", node, ast.Pass()))
        case ast.Assign([ast.Attribute() | ast.Subscript()]):
            found.append(("dropped", node, ast.Pass()))
        case ast.Break() | ast.Continue():
            found.append(("loop", node, ast.Continue() if isinstance(node, ast.Break) else ast.Break()))
        case ast.If(test):
            found.append(("branches", test, _negated(test)))
        case ast.Return(ast.Tuple([first, second, *rest]) as value):
            found.append(("returned", value, ast.Tuple([second, first, *rest], ast.Load())))
    if isinstance(node, ast.AugAssign) and type(node.op) in _OPERATORS:
        other = ast.AugAssign(node.target, _OPERATORS[type(node.op)](), node.value)
        found.append(("arithmetic", node, other))
    for expression in _expressions(node):
        found += _expression_changes(expression)
    if not found and isinstance(node, ast.Return) and ast.unparse(node) not in ("return", "return None"):
        found.append(("nothing returned", node.value, ast.Constant(None)))
    return found


def _expressions(node: ast.stmt) -> Iterator[ast.expr]:
    """Expressions of a statement, without those of its body, and without f-strings of a `raise`."""
    parts: list[ast.AST]
    match node:
        case ast.FunctionDef(args=arguments):
            parts = [default for default in (*arguments.defaults, *arguments.kw_defaults) if default]
        case ast.ClassDef() | ast.Try():
            parts = []
        case ast.AnnAssign(value=value):
            parts = [value] if value else []
        case ast.If(part) | ast.While(part) | ast.For(_, part) | ast.Match(part):
            parts = [part]
        case ast.With(items):
            parts = [item.context_expr for item in items]
        case _:
            parts = list(ast.iter_child_nodes(node))

    def walk(part: ast.AST) -> Iterator[ast.expr]:
        if isinstance(part, ast.JoinedStr) and isinstance(node, ast.Raise):
            return
        if isinstance(part, ast.expr):
            yield part
        for child in ast.iter_child_nodes(part):
            if not _is_required(part, child):
                yield from walk(child)

    for part in parts:
        yield from walk(part)


def _is_required(call: ast.AST, keyword: ast.AST) -> bool:
    """Whether `make lint` requires the keyword (`strict` of `zip`), or tests/test_imports.py does (`encoding`)."""
    match call, keyword:
        case ast.Call(ast.Name("zip")), ast.keyword("strict"):
            return True
        case ast.Call(), ast.keyword("encoding"):
            return True
    return False


def _expression_changes(node: ast.expr) -> Iterator[Change]:
    """Possible changes of one expression, without those of its parts."""
    match node:
        case ast.Constant(bool(value)):
            yield "boolean", node, ast.Constant(not value)
        case ast.Constant(int(value)):
            yield "constant", node, ast.Constant(value + 1)
        case ast.Constant(float(value)):
            yield "constant", node, ast.Constant(2 * value or 1.0)
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            yield "arithmetic", node, ast.BinOp(left, _OPERATORS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield "boolean", node, ast.BoolOp(_OPERATORS[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.Invert(), operand):
            yield "boolean", node, operand
        case ast.UnaryOp(ast.USub(), operand):
            yield "arithmetic", node, operand
        case ast.Compare(left, ops, values):
            for index, op in enumerate(ops):
                changed = [*ops[:index], _OPERATORS[type(op)](), *ops[index + 1 :]]
                yield "comparison", node, ast.Compare(left, changed, values)
        case ast.IfExp(test, body, orelse):
            yield "branches", node, ast.IfExp(test, orelse, body)
        case ast.Slice(lower, upper):
            if lower and not isinstance(lower, ast.Constant):
                yield "slice", lower, ast.BinOp(lower, ast.Add(), ast.Constant(1))
            if upper and not isinstance(upper, ast.Constant):
                yield "slice", upper, ast.BinOp(upper, ast.Sub(), ast.Constant(1))
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            for condition in (test for generator in node.generators for test in generator.ifs):
                yield "filter", condition, _negated(condition)
        case ast.Call(ast.Name(name) | ast.Attribute(attr=name), arguments, keywords):
            yield from _call_changes(node, name, arguments, keywords)


def _call_changes(
    node: ast.Call, name: str, arguments: list[ast.expr], keywords: list[ast.keyword]
) -> Iterator[Change]:
    for keyword in (one for one in keywords if not _is_required(node, one)):
        yield "keyword", node, ast.Call(node.func, arguments, [other for other in keywords if other is not keyword])
    for index, (one, two) in enumerate(pairwise(arguments)):
        if name not in _SYMMETRIC and ast.Starred not in (type(one), type(two)) and ast.dump(one) != ast.dump(two):
            swapped = [*arguments[:index], two, one, *arguments[index + 2 :]]
            yield "arguments", node, ast.Call(node.func, swapped, keywords)
    if other := _OTHER_FUNCTION.get(name):
        is_method = isinstance(node.func, ast.Attribute)
        function = ast.Attribute(node.func.value, other, ast.Load()) if is_method else ast.Name(other, ast.Load())
        yield "function", node, ast.Call(function, arguments, keywords)
    if name in _OMITTED and len(arguments) == 1:
        yield "function", node, arguments[0]
    if name == "sorted":
        yield "order", node, ast.Call(ast.Name("list", ast.Load()), arguments, [])


def _negated(test: ast.expr) -> ast.expr:
    match test:
        case ast.UnaryOp(ast.Not(), operand):
            return operand
    return ast.UnaryOp(ast.Not(), test)
