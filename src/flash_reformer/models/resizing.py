"""Position tables of another size: on load, and in a model that stands in memory.

A table is a list of rows. Growing appends rows drawn like those of a new model, shrinking takes rows off the end, and
every other row stays the same bit for bit. So whatever grew gives the old table back exactly when it is cropped.

For axial tables (Reformer, appendix) that holds axis by axis: **a point of the grid keeps its vector** as long as the
new grid has it. What number that point has is a matter of the axes behind the first. While those keep their sizes,
position j stays at its point, so every old position keeps its embedding. Where a trailing axis changes, positions are
*remapped*: the embedding of old position j moves to the number that its point has in the new grid, for two axes from
``j = a * n_2 + b`` to ``a * m_2 + b``. Only the positions of the first row, ``j < min(n_2, m_2)``, keep their number,
and a warning says so. Nothing better exists that loses no row and gives no two positions one embedding: the rows of a
factorised table serve whole slices of positions.

Interpolation, on request only, stretches each axis instead: the first and the last row stay, those between are read
off linearly at equal distances. It draws nothing, and moves every position inside.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from flash_reformer.layers.embeddings import AxialPositionEmbeddings, PositionEmbeddings
from flash_reformer.models.configuration_reformer import POSITION_FIELDS, ReformerConfig

#: The fields that ``from_pretrained`` takes for a wish to resize, and those that say what kind of tables there are.
_SIZES = ("axial_pos_shape", "max_position_embeddings")
_FIELDS = POSITION_FIELDS
_DEFAULTS = {name: getattr(ReformerConfig, name) for name in _FIELDS}


def resize_rows(rows_ND: Tensor, size: int, std: float, *, interpolate: bool = False) -> Tensor:
    """Return ``[size, D]``: the rows ``[N, D]`` cropped, lengthened by rows of N(0, ``std``), or interpolated."""
    N, D = rows_ND.shape
    if size == N:
        return rows_ND.clone()
    if interpolate:
        steps = torch.arange(size, dtype=torch.float64, device=rows_ND.device)
        places = steps * (N - 1) / max(size - 1, 1)
        low = places.floor()
        wide = rows_ND.to(torch.promote_types(rows_ND.dtype, torch.float32))
        share = (places - low).to(wide.dtype).unsqueeze(1)
        return torch.lerp(wide[low.long()], wide[places.ceil().long()], share).to(rows_ND.dtype)
    fresh = rows_ND.new_empty(max(size - N, 0), D).normal_(0.0, std)
    return torch.cat([rows_ND[:size], fresh])


def check_shape(shape: object, old_shape: Sequence[int]) -> tuple[int, ...]:
    """Return ``axial_pos_shape`` as a tuple, or raise ``ValueError`` where a table of ``old_shape`` cannot take it."""
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not all(map(_is_size, shape)):
        raise ValueError(f"axial_pos_shape must be a non-empty list of integers >= 1; got {shape!r}")
    new_shape: tuple[int, ...] = tuple(shape)
    if len(new_shape) != len(old_shape):
        raise ValueError(
            f"axial_pos_shape must keep the number of axes, {len(old_shape)}: the tables have shape "
            f"{tuple(old_shape)}; got {new_shape}"
        )
    return new_shape


def check_length(length: object) -> int:
    """Return a number of positions, or raise ``ValueError``."""
    if not _is_size(length):
        raise ValueError(f"max_position_embeddings must be an integer >= 1; got {length!r}")
    return cast(int, length)


def _check_flag(interpolate: object) -> None:
    if not isinstance(interpolate, bool):
        raise TypeError(f"interpolate_positions must be True or False; got {interpolate!r}")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _warn_of_remapping(old: tuple[int, ...], new: tuple[int, ...], stacklevel: int) -> None:
    if old[1:] == new[1:]:
        return
    # The first point whose number differs: every axis but the last changed one counts in whole steps of those behind.
    changed = max(axis for axis in range(1, len(old)) if old[axis] != new[axis])
    kept = min(old[changed], new[changed]) * math.prod(old[changed + 1 :])
    warnings.warn(
        f"axial_pos_shape changes from {old} to {new} in a trailing axis: points of the grid keep their vectors, but "
        f"positions from {kept} on stand at other points than before, so a trained model has to learn them anew",
        stacklevel=stacklevel,
    )


def _resize_axial(
    module: AxialPositionEmbeddings, shape: tuple[int, ...], std: float, interpolate: bool, stacklevel: int
) -> None:
    old_shape = module.axial_pos_shape
    tables = []
    for axis, weight in enumerate(module.weights):
        rows_ND = resize_rows(weight.detach().flatten(0, -2), shape[axis], std, interpolate=interpolate)
        sizes = [1] * len(shape)
        sizes[axis] = shape[axis]
        tables.append(nn.Parameter(rows_ND.view(*sizes, -1), requires_grad=weight.requires_grad))
    if not interpolate:
        _warn_of_remapping(old_shape, shape, stacklevel + 1)
    for axis, table in enumerate(tables):
        if shape[axis] != old_shape[axis]:
            module.weights[axis] = table
    module.axial_pos_shape = shape


class ResizablePositions:
    """The part of a Reformer that changes how many positions it has."""

    def get_position_embeddings(self: Any) -> Any:
        """Return the module of the position tables: axial, or one learned table."""
        return self.base_model.embeddings.position_embeddings

    def resize_position_embeddings(
        self: Any, new_num_position_embeddings: int | Sequence[int], *, interpolate_positions: bool = False
    ) -> nn.Module:
        """Change the number of positions; rows, warnings and interpolation as this file's first lines say.

        New rows are drawn from torch's default generator: N(0, ``axial_norm_std``) for axial tables,
        N(0, ``initializer_range``) for a learned one. The config follows. An optimizer that was made before still
        holds the old tables.

        Args:
            new_num_position_embeddings: ``axial_pos_shape``, with as many axes as before, for axial tables; or their
                number of positions, a multiple of the trailing axes' product, which sets the first axis. For a
                learned table its length.
            interpolate_positions: stretch the tables to the new size instead of cropping them or adding rows.

        Returns:
            the module of the position tables.

        Raises:
            ValueError: for sizes that the tables cannot take, and for tables that are offloaded. Nothing has changed
                then.
        """
        return self._resize_positions(new_num_position_embeddings, interpolate_positions, stacklevel=3)

    def _resize_positions(self: Any, size: Any, interpolate: bool, stacklevel: int) -> nn.Module:
        _check_flag(interpolate)
        config, module = self.config, self.get_position_embeddings()
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError("the position tables are on the meta device, offloaded or never filled: load them first")
        if isinstance(module, AxialPositionEmbeddings):
            if isinstance(size, int) and not isinstance(size, bool):
                size = (_first_axis(size, module.axial_pos_shape), *module.axial_pos_shape[1:])
            shape = check_shape(size, module.axial_pos_shape)
            _resize_axial(module, shape, config.axial_norm_std, interpolate, stacklevel + 1)
            config.axial_pos_shape = shape
            return module
        assert isinstance(module, PositionEmbeddings)
        if isinstance(size, Sequence):
            raise ValueError(
                "new_num_position_embeddings must be an integer: the model has one learned table "
                f"(axial_pos_embds=False); got {size!r}"
            )
        length, table = check_length(size), module.embedding
        if length != table.num_embeddings:
            rows_ND = resize_rows(table.weight.detach(), length, config.initializer_range, interpolate=interpolate)
            table.weight = nn.Parameter(rows_ND, requires_grad=table.weight.requires_grad)
            table.num_embeddings = length
        config.max_position_embeddings = length
        return module

    @classmethod
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        interpolate_positions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as :meth:`transformers.PreTrainedModel.from_pretrained` does, in another size if asked for.

        ``axial_pos_shape`` and ``max_position_embeddings``, given here, to an Auto class or to the ``from_pretrained``
        of the configuration that is passed, resize the checkpoint's tables after loading, as
        :meth:`resize_position_embeddings` does. A configuration that was merely built or changed to other sizes than
        the checkpoint's stays the error that it is for every model.

        Args:
            interpolate_positions: stretch the tables to the new size instead of cropping them or adding rows.

        Raises:
            ValueError: for another number of axes or other ``axial_pos_embds_dim`` than the checkpoint's, and for an
                ``axial_pos_shape`` where the checkpoint has one learned table.
        """
        _check_flag(interpolate_positions)
        asked = {name: kwargs.pop(name) for name in _SIZES if kwargs.get(name) is not None}
        stored: dict[str, Any] = {}
        loaded_as: dict[str, Any] = kwargs
        if isinstance(config, ReformerConfig):
            loaded_as = {name: getattr(config, name) for name in _FIELDS}
            stored = config.checkpoint_positions or loaded_as
            asked = {**{name: loaded_as[name] for name in _SIZES}, **asked}
            config = copy.deepcopy(config)
            vars(config).pop("checkpoint_positions", None)
        elif asked:
            source = pretrained_model_name_or_path if config is None else config
            stored = {**_DEFAULTS, **cls.config_class.get_config_dict(source, **kwargs)[0]}
        asked = {name: size for name, size in asked.items() if not _same(size, stored[name])}
        resizes = bool(asked) and _check_request(asked, stored, loaded_as, kwargs.get("ignore_mismatched_sizes", False))
        # Loading sees the checkpoint's sizes, unless it makes the tables anew anyway.
        for name, size in (stored if resizes else asked).items():
            if name in _SIZES and isinstance(config, ReformerConfig):
                setattr(config, name, size)
            elif name in _SIZES and not resizes:
                kwargs[name] = size
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)  # type: ignore[misc]
        if interpolate_positions and not resizes:
            warnings.warn("interpolate_positions=True has no effect: no table changes its size", stacklevel=2)
        if resizes:
            _resize_loaded(loaded[0] if isinstance(loaded, tuple) else loaded, asked, interpolate_positions)
        return loaded


def _same(size: Any, other: Any) -> bool:
    return tuple(size) == tuple(other) if isinstance(size, Sequence) and isinstance(other, Sequence) else size == other


def _check_request(
    asked: Mapping[str, Any], stored: Mapping[str, Any], loaded_as: Mapping[str, Any], ignore_mismatched_sizes: bool
) -> bool:
    """Return whether tables of a checkpoint are to be resized, or raise where they cannot be.

    False where the call asks for other tables altogether: those start fresh, in whatever size.
    """
    if loaded_as.get("axial_pos_embds", stored["axial_pos_embds"]) != stored["axial_pos_embds"]:
        return False
    if "max_position_embeddings" in asked:
        check_length(asked["max_position_embeddings"])
    if not stored["axial_pos_embds"]:
        if "axial_pos_shape" in asked:
            raise ValueError(
                "axial_pos_shape has no meaning for this checkpoint, which has one learned table "
                f"(axial_pos_embds=False): give max_position_embeddings; got {asked['axial_pos_shape']!r}"
            )
        return True
    dims = loaded_as.get("axial_pos_embds_dim", stored["axial_pos_embds_dim"])
    if not _same(dims, stored["axial_pos_embds_dim"]):
        if ignore_mismatched_sizes:
            return False
        raise ValueError(
            f"axial_pos_embds_dim must be the checkpoint's, {list(stored['axial_pos_embds_dim'])}: the widths of its "
            f"tables cannot change; got {dims!r}"
        )
    if "axial_pos_shape" in asked:
        check_shape(asked["axial_pos_shape"], stored["axial_pos_shape"])
    return True


def _resize_loaded(model: Any, asked: Mapping[str, Any], interpolate: bool) -> None:
    if "axial_pos_shape" in asked:
        model._resize_positions(asked["axial_pos_shape"], interpolate, stacklevel=5)
    if "max_position_embeddings" in asked:
        if model.config.axial_pos_embds:  # where it says nothing about tables
            model.config.max_position_embeddings = asked["max_position_embeddings"]
        else:
            model._resize_positions(asked["max_position_embeddings"], interpolate, stacklevel=5)


def _first_axis(positions: int, shape: tuple[int, ...]) -> int:
    slices = math.prod(shape[1:])
    if positions < 1 or positions % slices:
        raise ValueError(
            f"new_num_position_embeddings must be a multiple of {slices}, the positions of one row of the first axis "
            f"of {shape}, or a whole axial_pos_shape; got {positions}"
        )
    return positions // slices
