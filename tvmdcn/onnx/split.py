# SPDX-License-Identifier: Apache-2.0
"""A model cut at its ``DeformConv`` nodes: parts for onnxruntime between layers for tvmdcn's kernels.

Every node of the graph has a depth: how many layers lie before it on the longest way from an input. The nodes of one
depth are a part. What depends on constants only has none: it is put into each part that needs it, so that
onnxruntime still sees weights, shapes and scales as constants, and folds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import onnx
import onnx.inliner

from tvmdcn.errors import SpecError
from tvmdcn.onnx.node import DOMAINS, OPERATOR, LayerNode, is_layer

__all__ = ["Part", "Split"]

# Operators of ONNX without inputs, or with inputs that are not all they depend on.
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
_OVERRIDABLE_SINCE = 4
"""The version of ONNX' format from which an initializer that is an input too is that input's default."""


@dataclass
class Part:
    """Nodes that are run by onnxruntime, at once.

    Parameters
    ----------
    nodes : list of NodeProto
        In the order of the graph.
    inputs : list of str
        What comes from elsewhere: inputs of the graph, results of layers and of earlier parts.
    outputs : list of str
        What is needed elsewhere.
    """

    nodes: list[onnx.NodeProto]
    inputs: list[str]
    outputs: list[str]


@dataclass
class Split:
    """A model, cut.

    Parameters
    ----------
    model : ModelProto
        Its own functions that hold layers are inlined; the argument is not changed.

    Attributes
    ----------
    steps : list of Part or LayerNode
        In an order in which they can be run.
    fixed : list of str
        The constants that a layer takes, or that are results of the model.
    folded : Part
        The nodes that those depend on, where they are no constants of the graph as it stands.

    Raises
    ------
    SpecError
        If a layer stands inside a subgraph (of If, Loop, Scan), or the graph is no graph of ONNX.
    """

    model: onnx.ModelProto
    steps: list[Part | LayerNode] = field(init=False)
    fixed: list[str] = field(init=False)
    folded: Part = field(init=False)

    def __post_init__(self) -> None:
        """Cut the model."""
        if any(is_layer(node) for function in self.model.functions for node in _all_nodes(function.node)):
            self.model = onnx.inliner.inline_local_functions(self.model)
        graph = self.model.graph
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
        self._values = {value.name: value for value in graph.value_info}
        given = {value.name for value in graph.input}
        if self.model.ir_version < _OVERRIDABLE_SINCE:
            given -= self._initializers.keys()
        self.inputs = [value for value in graph.input if value.name in given]
        # Names that stand for the same in every run.
        self.constants = (self._initializers.keys() | self._sparse.keys()) - given
        self._needs = [_inputs_of(node) for node in graph.node]
        self._producers = {name: at for at, node in enumerate(graph.node) for name in node.output if name}
        self._depths = self._measure(given)
        self._cut()

    @property
    def defaults(self) -> dict[str, onnx.TensorProto]:
        """The values of inputs that may be left out."""
        return {v.name: self._initializers[v.name] for v in self.inputs if v.name in self._initializers}

    @property
    def layers(self) -> list[LayerNode]:
        """The layers, in the order in which they are run."""
        return [step for step in self.steps if isinstance(step, LayerNode)]

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """Return a constant of the graph, if it is one as it stands."""
        return self._initializers.get(name) if name in self.constants else None

    def _measure(self, given: set[str]) -> list[int | None]:
        """Return the depth of each node, None for those that depend on constants only."""
        depth_of: dict[str, int | None] = {**dict.fromkeys(given, 0), **dict.fromkeys(self.constants)}
        found: list[int | None] = []
        for node, needs in zip(self.model.graph.node, self._needs, strict=True):
            for name in needs:
                if name not in depth_of:
                    raise SpecError(
                        f"node {node.name!r} ({node.op_type}) needs {name!r}, which is no input, no initializer and no "
                        "output of a node before it. Check the model with onnx.checker.check_model."
                    )
            inside = list(_all_nodes(_subgraph_nodes(node)))
            for inner in inside:
                if is_layer(inner):
                    raise SpecError(
                        f"{OPERATOR} node {inner.name!r} is in a subgraph of node {node.name!r} ({node.op_type}), "
                        "where the model cannot be cut. Export the model without control flow around it, or fold the "
                        "condition with a simplifier of ONNX models if it is constant; or run it in onnxruntime."
                    )
            depths = [depth for name in needs if (depth := depth_of[name]) is not None]
            standard = node.domain in DOMAINS or node.domain.startswith(("ai.onnx.", "com.microsoft"))
            random = any(each.op_type in _RANDOM for each in (node, *inside))
            constant = not depths and standard and not random and not is_layer(node)
            depth = None if constant else max(depths, default=0)
            found.append(depth)
            after = depth if depth is None or not is_layer(node) else depth + 1
            depth_of.update(dict.fromkeys(filter(None, node.output), after))
            if constant:
                self.constants.update(filter(None, node.output))
        for value in self.model.graph.output:
            if value.name not in depth_of:
                raise SpecError(f"the model's output {value.name!r} is made by no node. Check it with onnx.checker.")
        return found

    def _cut(self) -> None:
        nodes = self.model.graph.node
        layers = {at: LayerNode.of(node) for at, node in enumerate(nodes) if is_layer(node)}
        results = [value.name for value in self.model.graph.output]
        asked = list(dict.fromkeys([*results, *(name for layer in layers.values() for name in layer.inputs)]))
        self.fixed = [name for name in asked if name in self.constants]
        self.folded = self._part([name for name in self.fixed if name in self._producers], None)
        self.steps = []
        # From the end: what a part needs of earlier ones is what those have to give.
        wanted = [name for name in asked if name not in self.constants]
        for depth in sorted({depth for depth in self._depths if depth is not None}, reverse=True):
            self.steps[:0] = [layer for at, layer in layers.items() if self._depths[at] == depth]
            outputs = [name for name in wanted if self._depth_of(name) == depth and self._producers[name] not in layers]
            if outputs:
                part = self._part(outputs, depth)
                self.steps.insert(0, part)
                wanted = list(dict.fromkeys([*wanted, *part.inputs]))

    def _depth_of(self, name: str) -> int | None:
        at = self._producers.get(name)
        return None if at is None else self._depths[at]

    def _part(self, outputs: list[str], depth: int | None) -> Part:
        """Return the nodes of a depth that these outputs need, and the constant ones."""
        nodes, inputs, seen = set(), [], set(outputs)
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            at = self._producers.get(name)
            inside = at is not None and (
                self._depths[at] is None or (self._depths[at] == depth and not is_layer(self.model.graph.node[at]))
            )
            if not inside or at is None:
                if name not in self.constants:
                    inputs.append(name)
            elif at not in nodes:
                nodes.add(at)
                new = [needed for needed in self._needs[at] if needed not in seen]
                seen.update(new)
                waiting += new
        return Part([self.model.graph.node[at] for at in sorted(nodes)], sorted(inputs), outputs)

    def model_of(self, part: Part, inputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        """Return a part as a model of its own; the types of its outputs are left to onnxruntime to find."""
        used = {name for node in part.nodes for name in _inputs_of(node)} | set(part.outputs)
        made = {name for node in part.nodes for name in node.output} - set(part.outputs)
        graph = onnx.GraphProto(name=f"{self.model.graph.name}: {', '.join(part.outputs)}"[:200])
        graph.node.extend(part.nodes)
        graph.input.extend(inputs)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in part.outputs)
        graph.initializer.extend(t for name, t in self._initializers.items() if name in used & self.constants)
        graph.sparse_initializer.extend(t for name, t in self._sparse.items() if name in used & self.constants)
        graph.value_info.extend(value for name, value in self._values.items() if name in made)
        model = onnx.ModelProto(
            ir_version=self.model.ir_version,
            producer_name=self.model.producer_name,
            producer_version=self.model.producer_version,
            graph=graph,
        )
        model.opset_import.extend(self.model.opset_import)
        model.functions.extend(self.model.functions)
        return model


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def _subgraph_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(node):
        yield from graph.node


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        yield from _all_nodes(_subgraph_nodes(node))


def _inputs_of(node: onnx.NodeProto) -> list[str]:
    """Return the names that a node needs, those that its subgraphs take from around it included."""
    return list(dict.fromkeys([*filter(None, node.input), *(name for g in _graphs(node) for name in _free_names(g))]))


def _free_names(graph: onnx.GraphProto) -> list[str]:
    """Return the names that a subgraph takes from around it."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    free = []
    for node in graph.node:
        free += [name for name in _inputs_of(node) if name not in own]
        own.update(node.output)
    return [*free, *(value.name for value in graph.output if value.name not in own)]
