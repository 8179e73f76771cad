"""A graph under construction: what the rules emit and the passes rewrite, before it becomes a CrypTen graph.

A value is named by a short id (`v12`); a node gets its final name only at the end, when it is known which nodes stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from privinf.crypten_adapter import Graph
from privinf.graph.node import Node, Shape


def layer_of(path: str) -> str:
    """The layer that a module path belongs to: up to its first number (`h.3.attn` -> `h.3`), else its parent, '' at the top."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])


def joint_name(names: list[str]) -> str:
    """`attn.q.linear`, `attn.k.linear` -> `attn.q+k.linear`."""
    paths = [name.removesuffix(".linear").split(".") for name in names]
    if any(path[:-1] != paths[0][:-1] for path in paths):
        return names[0]
    return ".".join([*paths[0][:-1], "+".join(dict.fromkeys(path[-1] for path in paths)), "linear"])


class Draft:
    """Nodes by id, what each reads, the shape of each value, and the one output."""

    def __init__(self) -> None:
        self.inputs: list[str] = []
        self.nodes: dict[str, Node] = {}
        self.reads: dict[str, list[str]] = {}
        self.shapes: dict[str, Shape] = {}
        self.output = ""
        self.earlier: dict[str, list[str]] = {}  # what is to be computed before a value, besides what that reads
        self._readers: dict[str, dict[str, None]] = {}
        self._count = 0

    def add_input(self, name: str, shape: Shape) -> str:
        """Adds an input of this shape; its name, which nodes read."""
        self.inputs.append(name)
        self.shapes[name] = shape
        self._readers[name] = {}
        return name

    def add(self, node: Node, reads: Sequence[str]) -> str:
        """Add a node and return the id of its value."""
        self._count += 1
        key = f"v{self._count}"
        self.shapes[key] = node.output_shape(*(self.shapes[read] for read in reads))
        self.nodes[key] = node
        self.reads[key] = list(reads)
        self._readers[key] = {}
        for read in reads:
            self._readers[read][key] = None
        return key

    def producer(self, key: str) -> Node | None:
        """The node that makes a value; None for an input of the graph."""
        return self.nodes.get(key)

    def readers(self, key: str) -> list[str]:
        """The nodes that read a value, each once."""
        return list(self._readers[key])

    def single_reader(self, key: str) -> str | None:
        """The one node that reads a value, if it is read once and is not the output."""
        readers = self._readers[key]
        return next(iter(readers)) if len(readers) == 1 and key != self.output else None

    def swap(self, old: str, new: str, only: Sequence[str] | None = None) -> None:
        """Let the readers of `old` (or `only` these), and the output, read `new` instead."""
        for reader in list(self._readers[old]) if only is None else only:
            if reader == new and only is None:
                continue  # the new value is made from the old one
            self.reads[reader] = [new if read == old else read for read in self.reads[reader]]
            self._readers[old].pop(reader, None)
            self._readers[new][reader] = None
        if only is None and self.output == old:
            self.output = new

    def replace(self, key: str, node: Node, reads: Sequence[str]) -> str:
        """Put a new node where `key` was."""
        new = self.add(node, reads)
        self.swap(key, new)
        self.drop(key)
        return new

    def drop(self, key: str) -> None:
        """Remove a node that nobody reads."""
        for read in self.reads.pop(key):
            self._readers[read].pop(key, None)
        del self.nodes[key], self.shapes[key], self._readers[key]

    def prune(self) -> None:
        """Remove every node that the output does not need."""
        needed = set(self.order())
        for key in [key for key in self.nodes if key not in needed]:
            for read in self.reads.pop(key):
                self._readers[read].pop(key, None)
            del self.nodes[key], self.shapes[key]
        self._readers = {key: readers for key, readers in self._readers.items() if key in self.shapes}

    def order(self) -> list[str]:
        """The nodes that the output needs, inputs before readers, otherwise in order of creation of what needs them."""
        done: dict[str, None] = {}
        stack: list[tuple[str, Iterator[str]]] = []
        for root in [self.output] if self.output else list(self.nodes):
            if root in self.nodes and root not in done:
                stack.append((root, self._before(root)))
            while stack:
                key, rest = stack[-1]
                for read in rest:
                    if read in self.nodes and read not in done:
                        stack.append((read, self._before(read)))
                        break
                else:
                    stack.pop()
                    done[key] = None
        return list(done)

    def _before(self, key: str) -> Iterator[str]:
        return iter([*self.earlier.get(key, ()), *self.reads[key]])

    def finish(self) -> Graph:
        """The CrypTen graph, its nodes named by module path and kind."""
        names = {name: name for name in self.inputs}
        taken = set(self.inputs)
        graph_nodes: list[tuple[Node, list[str]]] = []
        for key in self.order():
            node, base, count = self.nodes[key], self.nodes[key].name, 1
            while node.name in taken:
                count += 1
                node.name = f"{base}_{count}"
            taken.add(node.name)
            names[key] = node.name
            graph_nodes.append((node, [names[read] for read in self.reads[key]]))
        graph = Graph(self.inputs, [names[self.output]])
        for node, inputs in graph_nodes:
            graph.append(node, inputs)
        graph.eval()
        return graph
