"""Rewrites the syntax tree of a chat template, so that rendering it counts what it does (see sandbox.py)."""

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from server.text.budget import CONTAINERS, current


class Counting(NodeTransformer):
    """Rewrites a template so that it counts what it does."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(through(nodes.Const(None, lineno=node.lineno), "counted")))
        if node.test is not None:
            node.test = nodes.And(through(nodes.Const(True, lineno=node.lineno), "counted"), node.test)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        node.node = through(node.node, "weighed")
        return node

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        plain = all(isinstance(item, nodes.Const) for item in node.items)
        stored = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if plain or stored else through(node, "weighed")

    visit_Dict = visit_Tuple = visit_List

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return through(nodes.Tuple(node.nodes, "load"), "concatenated")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return through(node, "made") if isinstance(node.arg, nodes.Slice) else node


def through(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def counted(value: object) -> object:
    current().step()
    return value


def weighed(value: object) -> object:
    if isinstance(value, CONTAINERS):
        current().weigh(value)
    return value


def made(value: object) -> object:
    current().made(value)
    return value


def concatenated(parts: tuple[object, ...]) -> str:
    budget = current()
    budget.chars(sum(budget.weigh(part) for part in parts))
    return "".join(map(str, parts))


COUNTERS = {"counted": counted, "weighed": weighed, "made": made, "concatenated": concatenated}  # filters
