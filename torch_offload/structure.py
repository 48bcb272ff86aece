"""Where a model keeps its layers: a structural map of blocks and the halves inside them.

Nothing here knows the name of a model. A *block* is an element of a container (``ModuleList``,
plain ``Sequential``, ``ModuleDict``, numbered attributes of one class); a *stage* is a block that
holds further blocks and is opened in turn; a *half* is a callable child of a block that holds
enough of its bytes to be worth moving on its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

Kind = Literal["mha", "ffn"]

# A child of a block moves on its own from this share of the block's bytes on. Relative, so that a
# tiny model is cut as its large sibling is.
HALF_SHARE = 0.02
# A child of several matrices is no norm and no router, so it may be smaller: the attention of a
# mixture-of-experts layer can be below 2 % of the layer and still be gigabytes over all layers.
COMPOSITE_HALF_SHARE = 0.001
# A block whose own parameters (no child's) reach this share cannot leave them on the device.
OWN_SHARE = 0.10
# A parameter counts as one of a module's matrices from this share of its bytes on; below lie
# biases, norms and adapters of low rank.
MATRIX_SHARE = 0.10
# Containers of single projections are heads and convolutional stems, unless they hold this much.
LIST_OF_LEAVES_SHARE = 0.10

# Their parents, or fused kernels, read their children's weights without calling the children.
CLOSED_TYPES: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
    torch.jit.ScriptModule,
)

_ATTENTION_WORDS = re.compile(
    r"attn|attention|mixer|mamba|ssm|rwkv|time_mix|linear_attn|temporal|conv|mlstm|slstm|recurrent",
    re.IGNORECASE,
)
_FFN_WORDS = re.compile(
    r"mlp|ffn|feed_?forward|ff(?![a-z])|^fc|^lin\d|moe|expert|intermediate|^output$|densereludense",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Half:
    """One callable part of a block: what moves as one with ``granularity="sublayer"``."""

    name: str
    module: nn.Module
    kind: Kind


@dataclass(frozen=True)
class Block:
    """One element of a container of layers, with its halves in the order they likely run.

    A block that must stay in one piece has a single half: itself.
    """

    name: str
    module: nn.Module
    halves: tuple[Half, ...]


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others.

    A plain ``Sequential`` may be called or iterated: it counts as a container either way, since its
    elements are called in both cases.
    """
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        # A subclass may add a forward of its own and be called (a stack that runs itself).
        return not has_forward(module)
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def has_forward(module: nn.Module) -> bool:
    """Whether a module's class defines a forward, that is, whether it can be called at all."""
    forward = vars(module).get("forward", type(module).forward)
    return forward is not nn.Module.forward


def is_closed(module: nn.Module) -> bool:
    """Whether weights below this module may be read without their own module's call, by torch."""
    if isinstance(module, CLOSED_TYPES) or parametrize.is_parametrized(module):
        return True
    # torch.nn.utils.weight_norm and spectral_norm recompute `weight` in a hook before the forward.
    return any(
        type(hook).__module__.startswith("torch.nn.utils")
        for hook in module._forward_pre_hooks.values()
    )


def is_table(module: nn.Module) -> bool:
    """Whether a module is a lookup table: read sparsely, often tied, and so left on the device."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


# What a tensor of each layout that has no memory of its own is made of.
_PARTS: dict[torch.layout, tuple[str, ...]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def size_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; of a sparse one, those of its indices and values."""
    parts = _PARTS.get(tensor.layout)
    if parts is None:
        return tensor.numel() * tensor.element_size()
    return sum(size_bytes(getattr(tensor, part)()) for part in parts)


def kind_hint(name: str, module: nn.Module) -> Kind | None:
    """The label that a half's attribute name, else its class name, suggests; None without one."""
    for text in (attribute_name(name), type(module).__name__):
        # "proj_mlp" beside "attn": the FFN words are the narrower ones, so they are asked first.
        if _FFN_WORDS.search(text):
            return "ffn"
        if _ATTENTION_WORDS.search(text):
            return "mha"
    return None


def attribute_name(name: str) -> str:
    """The last part of a qualified name that is no number: ``h.0.layer.1`` is ``layer``."""
    words = [part for part in name.split(".") if not part.isdigit()]
    return words[-1] if words else name


# The blocks of one child, step by step: a container's elements, or the child itself.
_Run = list[list[Block]]


class ModelMap:
    """Sizes of every module of one model, and the blocks found in it.

    The parameters are only looked at, never copied; a map is valid as long as nobody adds or
    replaces a module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._bytes: dict[int, int] = {}
        self._matrices: dict[int, int] = {}

    @cached_property
    def names(self) -> dict[int, str]:
        """First qualified name of every module object, by ``id``."""
        return {id(module): name for name, module in self.model.named_modules()}

    @cached_property
    def blocks(self) -> list[Block]:
        """The model's blocks in module order; empty where no container holds weights."""
        found = list(_BlockFinder(self, lenient=False).find())
        return found or list(_BlockFinder(self, lenient=True).find())

    @cached_property
    def _movable_bytes(self) -> int:
        tables = {id(p) for m in self.model.modules() if is_table(m) for p in m.parameters()}
        return sum(size_bytes(p) for p in self.model.parameters() if id(p) not in tables)

    def bytes_of(self, module: nn.Module) -> int:
        """Bytes of all parameters below a module, each counted once."""
        if id(module) not in self._bytes:
            self._bytes[id(module)] = sum(size_bytes(p) for p in module.parameters())
        return self._bytes[id(module)]

    def share_of_model(self, module: nn.Module) -> float:
        """Bytes of a module over all bytes of the model that are no table's."""
        return self.bytes_of(module) / max(1, self._movable_bytes)

    def num_matrices(self, module: nn.Module) -> int:
        """How many parameters make up the bulk of a module: 1 is a projection, more a composite."""
        if id(module) not in self._matrices:
            least = MATRIX_SHARE * self.bytes_of(module)
            self._matrices[id(module)] = sum(
                1 for p in module.parameters() if p.ndim >= 2 and size_bytes(p) >= least
            )
        return self._matrices[id(module)]

    def is_composite(self, module: nn.Module) -> bool:
        """Whether several matrices work together below a module, as in an attention or an MLP."""
        if is_table(module):
            return False
        # Fused experts, and wide blocks of many projections, may have no single matrix of weight.
        return self.num_matrices(module) != 1 and self._has_matrix(module)

    def halves_below(self, block: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
        """Callable parts of a block, seen through its containers, that are worth a unit each."""
        total = self.bytes_of(block)
        return [
            (part_name, part)
            for part_name, part in parts_of(block, name)
            if not is_table(part)
            and has_forward(part)
            and self._has_matrix(part)
            and self.bytes_of(part)
            > total * (COMPOSITE_HALF_SHARE if self.is_composite(part) else HALF_SHARE)
        ]

    def own_bytes(self, block: nn.Module) -> int:
        """Bytes of a block that lie in no callable part of it, ``ParameterList``s included."""
        inside = {id(p) for _, m in parts_of(block, "") if has_forward(m) for p in m.parameters()}
        return sum(size_bytes(p) for p in block.parameters() if id(p) not in inside)

    def _has_matrix(self, module: nn.Module) -> bool:
        return any(p.ndim >= 2 for p in module.parameters())


def parts_of(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Children of a module with their qualified names, elements in place of containers."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if is_container(child):
            yield from parts_of(child, full)
        else:
            yield full, child


class _BlockFinder:
    """One walk over a model. `lenient` also takes projections in lists and numbered leaves."""

    def __init__(self, sizes: ModelMap, *, lenient: bool) -> None:
        self._map = sizes
        self._lenient = lenient
        self._seen: set[int] = set()

    def find(self) -> Iterator[Block]:
        model = self._map.model
        if is_container(model):
            yield from self._open_container("", model)
        else:
            yield from self._descend("", model)

    def _descend(self, name: str, module: nn.Module) -> Iterator[Block]:
        """Walks a module that is no block itself (a model, an encoder, a tower)."""
        if is_closed(module) or id(module) in self._seen:
            return
        self._seen.add(id(module))
        runs: list[_Run] = []
        for group in self._grouped_children(name, module):
            if isinstance(group, list):
                runs.append([list(self._open_element(n, m)) for n, m in group])
                continue
            child_name, child = group
            if is_container(child):
                if self._holds_blocks(child):
                    runs.append(self._open_steps(child_name, child))
            elif not is_table(child):
                runs.append([list(self._descend(child_name, child))])
        # Two lists of whole layers run one after the other (double, then single blocks).
        yield from self._interleave(runs, layers_alternate=False)

    def _grouped_children(
        self, name: str, module: nn.Module
    ) -> list[tuple[str, nn.Module] | list[tuple[str, nn.Module]]]:
        """Children in order; numbered siblings of one class (`block1`, `block2`) as one list."""
        families: dict[tuple[type, str], list[tuple[str, nn.Module]]] = defaultdict(list)
        ordered: list[tuple[str, nn.Module] | list[tuple[str, nn.Module]]] = []
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            numbered = re.search(r"\d", child_name) and not is_container(child)
            if not numbered or not (self._lenient or self._map.is_composite(child)):
                ordered.append((full, child))
                continue
            family = families[type(child), re.sub(r"\d+", "#", child_name)]
            family.append((full, child))
            if len(family) == 1:
                ordered.append(family)
        return [g[0] if isinstance(g, list) and len(g) == 1 else g for g in ordered]

    def _holds_blocks(self, container: nn.Module) -> bool:
        elements = [m for _, m in parts_of(container, "") if not is_table(m)]
        if any(self._map.is_composite(element) for element in elements):
            return True
        enough = self._lenient or self._map.share_of_model(container) >= LIST_OF_LEAVES_SHARE
        return enough and self._map.bytes_of(container) > 0

    def _open_steps(self, name: str, container: nn.Module) -> _Run:
        return [
            list(self._open_element(f"{name}.{child_name}" if name else child_name, child))
            for child_name, child in container.named_children()
        ]

    def _open_container(self, name: str, container: nn.Module) -> Iterator[Block]:
        for step in self._open_steps(name, container):
            yield from step

    def _open_element(self, name: str, element: nn.Module) -> Iterator[Block]:
        if is_container(element):
            yield from self._open_container(name, element)
        elif id(element) in self._seen or is_table(element) or not self._map._has_matrix(element):
            return
        elif self._is_stage(element):
            self._seen.add(id(element))
            yield from self._open_stage(name, element)
        else:
            self._seen.add(id(element))
            yield self._as_block(name, element)

    def _open_stage(self, name: str, stage: nn.Module) -> Iterator[Block]:
        """Opens a module that holds blocks; its other heavy children are blocks of their own."""
        least = HALF_SHARE * self._map.bytes_of(stage)
        runs: list[_Run] = []
        for child_name, child in stage.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if is_container(child):
                runs.append(self._open_steps(full, child))
            elif self._map.bytes_of(child) > least:
                runs.append([list(self._open_element(full, child))])
        yield from self._interleave(runs, layers_alternate=True)

    def _interleave(self, runs: list[_Run], *, layers_alternate: bool) -> Iterator[Block]:
        """Lists of equal length beside each other run in turns (a U-Net's resnets, attentions)."""
        runs = [run for run in runs if any(run)]
        start = 0
        while start < len(runs):
            stop = start + 1
            if layers_alternate or not self._has_layers(runs[start]):
                while stop < len(runs) and len(runs[stop]) == len(runs[start]):
                    stop += 1
            for steps in zip(*runs[start:stop], strict=True):
                for step in steps:
                    yield from step
            start = stop

    def _has_layers(self, run: _Run) -> bool:
        return len(run) < 2 or any(len(block.halves) > 1 for step in run for block in step)

    def _is_stage(self, module: nn.Module) -> bool:
        if is_closed(module):
            return False
        children = list(module.children())
        inner = [list(parts_of(child, "")) for child in children if is_container(child)]
        if any(self._is_layer(element) for elements in inner for _, element in elements):
            return True
        plain = [child for child in children if not is_container(child)]
        if any(self._is_stage(child) for child in plain if self._holds_layers(child)):
            return True
        # Layers of bare projections (a ResNet's, a U-Net's) count by repetition, unless the list is
        # a part of a layer beside others: two attentions in a list next to an MLP.
        if any(self._map.is_composite(child) for child in plain):
            return False
        for elements in inner:
            classes = [type(m) for _, m in elements if self._map.is_composite(m)]
            if len(classes) > len(set(classes)):
                return True
        return False

    def _holds_layers(self, module: nn.Module) -> bool:
        """Whether some list below a plain child holds layers, so that the child is no half."""
        return not is_closed(module) and any(
            self._is_layer(element)
            for holder in module.modules()
            if is_container(holder)
            for element in holder.children()
        )

    def _is_layer(self, module: nn.Module) -> bool:
        """Whether a module has two halves or more, one of them composite.

        Experts (bare matrices) and wrappers of one half (T5's) are no layers.
        """
        if is_container(module) or is_table(module):
            return False
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            return True
        if is_closed(module):
            return False
        halves = self._map.halves_below(module, "")
        return len(halves) >= 2 and any(self._map.is_composite(half) for _, half in halves)

    def _as_block(self, name: str, module: nn.Module) -> Block:
        halves = [] if is_closed(module) else self._map.halves_below(module, name)
        in_parts = any(self._map.is_composite(half) for _, half in halves)
        own_is_large = self._map.own_bytes(module) > OWN_SHARE * self._map.bytes_of(module)
        if has_forward(module) and (not in_parts or own_is_large):
            whole = Half(name, module, kind_hint(name, module) or "mha")
            return Block(name, module, (whole,))
        return Block(name, module, tuple(self._in_call_order(halves)))

    def _in_call_order(self, halves: list[tuple[str, nn.Module]]) -> list[Half]:
        """Labels halves; attention comes first, though 21 known models register the FFN first."""
        labelled: list[Half] = []
        attention_seen = False
        for name, module in halves:
            hint = kind_hint(name, module)
            attention_seen |= hint == "mha"
            # What nobody can name belongs to the attention before it, to the FFN after it.
            kind: Kind = hint or ("ffn" if attention_seen else "mha")
            labelled.append(Half(name, module, kind))
        return sorted(labelled, key=lambda half: half.kind == "ffn")
