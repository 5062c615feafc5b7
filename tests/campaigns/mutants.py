"""Faults put into a source file one at a time: another comparison, sign, number, answer or way."""

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
EXACT = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)  # swapped: the opposite
SILENT = ("annotation", "returns", "decorator_list")  # fields of nodes
TALK = ("log", "print", "warn")  # calls whose words no test should hold


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        line: Where, counted from 1.
        text: That line as it was.
        change: Source before and after.
        source: The whole file with the fault in it.
    """

    line: int
    text: str
    change: str
    source: str


def mutants(source: str, number: int, seed: int) -> list[Mutant]:
    """Draw faults of a file, without replacement.

    Args:
        source: The file.
        number: How many; fewer if there are not so many.
        seed: Another one draws others.
    """
    tree = ast.parse(source)
    changes = [change for node in _code(tree) for change in _changes(node)]
    drawn = random.Random(seed).sample(changes, min(number, len(changes)))
    return sorted((_mutant(source, *change) for change in drawn), key=lambda made: made.line)


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk through what runs and decides: no annotations, decorators, errors or words."""
    for name, value in ast.iter_fields(tree):
        children = value if isinstance(value, list) else [value]
        for child in children:
            if isinstance(child, ast.AST) and name not in SILENT and not _is_talk(child):
                yield child
                yield from _code(child)


def _is_talk(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ast.unparse(node.value.func).startswith(TALK)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    is_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return is_checking or (isinstance(node, ast.AnnAssign) and node.value is None)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield a node and the source that replaces it."""
    yield from _of_operators(node)
    yield from _of_ways(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, repr(node.value + 1)


def _of_operators(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            swapped = ast.Compare(left, [COMPARISONS[type(op)]()], [right])
            yield node, f"({ast.unparse(swapped)})"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            yield node, f"({ast.unparse(ast.BinOp(left, ARITHMETIC[type(op)](), right))})"
        case ast.BoolOp(op=op, values=values):
            other = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield node, f"({ast.unparse(ast.BoolOp(other, values))})"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, f"({ast.unparse(operand)})"


def _of_ways(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield node, "return None"
        case ast.Expr(value=ast.Call()):
            yield node, "pass"
        case ast.If(test=test) | ast.IfExp(test=test) if not _is_negated_above(test):
            yield test, f"(not ({ast.unparse(test)}))"
        case ast.comprehension(ifs=[test]):
            yield test, "True"


def _is_negated_above(test: ast.expr) -> bool:
    """Whether ``_of_operators`` makes the opposite of a condition, too: no fault counts twice."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        return isinstance(test.ops[0], EXACT)
    return isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _mutant(source: str, node: ast.AST, text: str) -> Mutant:
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    assert isinstance(node, ast.expr | ast.stmt)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    begin = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    coded = source.encode()
    before = " ".join(coded[begin:end].decode().split())
    made = (coded[:begin] + text.encode() + coded[end:]).decode()
    ast.parse(made)  # a fault that no interpreter reads would always be noticed
    place = lines[node.lineno - 1].strip()
    return Mutant(node.lineno, place, f"{before[:90]} -> {text[:90]}", made)
