"""What a user can set, as one frozen value that is handed down to every pass."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from svg2_compile.settings.options import ConfigError, canonical_names, parse_value
from svg2_compile.settings.presets import load_preset
from svg2_compile.settings.schedule import DensitySchedule

if TYPE_CHECKING:
    from svg2_compile.passes.sites import SitePolicy
    from svg2_compile.passes.sparsify import SparsityPolicy

__all__ = ["ConfigError", "Svg2Config", "package_version"]

DEFAULT_TOP_P = 0.9
DEFAULT_DENSE_STEPS = 0.2
DEFAULT_DENSITY = {"centroid": 0.25, "first_order": 0.10}
"""By compensation; without it a mass decides, as published."""
DEFAULT_DENSE_LAYERS: Mapping[str, int | float] = {"none": 0.03, "centroid": 0.03, "first_order": 0}
"""By compensation: as published, but for first order, with which a dense layer gains nothing (docs/quality.md)."""


@dataclass(frozen=True)
class Svg2Config:
    """The settings of one compiled model. Frozen and hashable; equal settings are equal values.

    Defaults are those of the SVG2 scripts where these are published (Sparse VideoGen2, arXiv 2505.18875), except
    compensation, routing, budget, density, dense layers, the cluster counts and k-means iterations, which follow
    measurements (docs/quality.md).

    Attributes:
        preset: the preset these settings started from ("name:variant"); only :meth:`from_options` applies one.
        top_p: softmax mass, estimated on centroids, that the selected key clusters of a query cluster reach. [0, 1];
            None is 0.9, where top_p decides.
        density: fixed budget instead of top_p: the fraction of (query, key) pairs that is computed exactly, of every
            query cluster or of all heads together (see budget). (0, 1], or None for top_p. "auto" is 0.10 with
            compensation="first_order" and 0.25 with "centroid", unless top_p is given, and None without compensation.
            With budget="layer" also a schedule over the sparse steps: "0.3..0.05" from the first to the last with even
            differences, or a list, "0.4, 0.2, 0.1", step by step, of which the last stays.
        target_error: relative output error of an attention, ||out - dense|| / ||dense||, that its density follows. It
            is measured on a few exact rows of every head, and the density of the layer's next step is higher or lower
            for it, between 0.02 and 0.5, without a host read. The density that is given (0.10 by default) is that of
            the first sparse step. Where 0.5 is too little for several steps, the layer is computed exactly, which is
            said. Needs budget="layer". (0, 1), or None.
        measure_error: measure that error without following it; the report shows it by layer and step.
        min_k_ratio: fraction of the key clusters that is selected at the least. [0, 1].
        num_q_clusters, num_k_clusters: clusters per head; None derives them from the number of video tokens.
        init_iters: k-means iterations where an attention has no centroids yet (once per video, guidance branch and
            layer).
        step_iters: k-means iterations that continue from the centroids of the previous step.
        dense_steps: denoising steps at the start of a video that stay dense: a count (int), or a fraction (float in
            [0, 1)) of the steps that run. "auto" is 0.2, or 0 with dense_timesteps.
        dense_last_steps: the same at the end of a video.
        dense_timesteps: steps whose timestep lies in this fraction of its range, counted from the noisy end, stay
            dense, as ``first_times_fp`` of the SVG2 scripts says; None: the timestep decides nothing.
        dense_layers: layers at the start of the model that stay dense: a count (int), or a fraction (float in [0, 1)).
            "auto" is 0 with compensation="first_order" and 0.03 otherwise.
        min_tokens: the shortest attention that becomes sparse: a number of video tokens, or "auto" for the cost
            model's crossover on the device.
        compensation: "none"; "centroid": key clusters that were not selected take part through their centroid
            (SVG-EAR, arXiv 2603.08982); "first_order": they do so with their exact mass and mean value at the centroid
            of the query's cluster, and with the slope of both next to it (docs/quality.md).
        routing: "score" selects by softmax mass; "error" by the error that compensation would make (SVG-EAR); it needs
            compensation. "auto" is "error" with compensation and "score" without.
        budget: who has the density: "row", every query cluster of every head alike; or "layer", all heads of an
            attention together, which spends it where compensation would err most and needs routing="error". "auto" is
            "layer" with compensation="first_order" and a density, "row" otherwise.
        balance_heads: spread heads over the ranks of Ulysses by what they cost, measured in the first sparse step of
            a video (docs/distributed.md); it needs collect_stats. Without ranks it does nothing.
        inner_backend: the torch.compile backend that compiles the graphs. "inductor" is replaced, with a warning,
            on machines where it cannot work.
        inductor_mode: mode for Inductor ("max-autotune" ...), None for its default.
        strict: raise where a warning and a dense or slower result would do.
        collect_stats: keep the density of every sparse attention for the report.
        store_limit_mb: the most MiB of centroids kept between steps. Wan 2.1 14B at 720p with guidance needs 2.1 GiB
            (40 layers x 2 branches x 40 heads x 1300 centroids x 128 floats).
        workspace_mb: the most MiB of device memory that one sparse attention uses for its lists of keys, on a GPU.
        dump_dir: a folder for the graph before and after every pass; None writes nothing.
    """

    preset: str | None = None
    top_p: float | None = None
    density: float | str | None = "auto"
    target_error: float | None = None
    measure_error: bool = False
    min_k_ratio: float = 0.1
    num_q_clusters: int | None = None
    num_k_clusters: int | None = None
    init_iters: int = 10
    step_iters: int = 1
    dense_steps: Any = "auto"  # int | float; "auto" is resolved
    dense_last_steps: int | float = 0
    dense_timesteps: float | None = None
    dense_layers: Any = "auto"  # int | float; "auto" is resolved
    min_tokens: int | str = "auto"
    compensation: str = "first_order"
    routing: str = "auto"
    budget: str = "auto"
    balance_heads: bool = False
    inner_backend: str = "inductor"
    inductor_mode: str | None = None
    strict: bool = False
    collect_stats: bool = True
    store_limit_mb: float = 8192.0
    workspace_mb: int = 256
    dump_dir: str | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            parsed = parse_value(item.name, getattr(self, item.name))
            object.__setattr__(self, item.name, parsed)
        if self.preset is not None:
            object.__setattr__(self, "preset", load_preset(self.preset).name)
        if self.dense_steps == "auto":
            object.__setattr__(self, "dense_steps", DEFAULT_DENSE_STEPS if self.dense_timesteps is None else 0)
        if self.dense_layers == "auto":
            object.__setattr__(self, "dense_layers", DEFAULT_DENSE_LAYERS[self.compensation])
        if self.routing == "auto":
            object.__setattr__(self, "routing", "score" if self.compensation == "none" else "error")
        if self.routing == "error" and self.compensation == "none":
            raise ConfigError(
                "routing='error' minimises the error of compensation, but compensation='none'. "
                "Valid: compensation='centroid' or 'first_order' with it, or routing='score'."
            )
        if self.budget == "auto":
            pooled = self.compensation == "first_order" and self.routing == "error" and self.selection()[1] is not None
            object.__setattr__(self, "budget", "layer" if pooled else "row")
        if self.budget == "layer":
            self._check_layer_budget()
        elif self.density_schedule() is not None:
            raise ConfigError(
                f"density={self.density!r} changes from step to step, but budget='row' has one density for all steps. "
                "Valid: budget='layer' with it (the default of compensation='first_order'), or one number."
            )
        if self.target_error is not None:
            self._check_target()
        if self.balance_heads and not self.collect_stats:
            raise ConfigError(
                "balance_heads=True spreads heads by their densities, but collect_stats=False. "
                "Valid: collect_stats=True with it."
            )
        if self.balance_heads and self.target_error is not None:
            raise ConfigError(
                "balance_heads=True spreads heads by densities that stay, but target_error moves them on every rank. "
                "Valid: one of the two."
            )
        if self.inner_backend == "svg2":
            raise ConfigError("inner_backend='svg2' is not valid: it names this compiler itself. Valid: 'inductor' ...")
        if self.inductor_mode is not None:
            self._check_inductor_mode(self.inductor_mode)

    def _check_layer_budget(self) -> None:
        if self.routing != "error":
            raise ConfigError(
                "budget='layer' spends pairs where compensation errs most, but routing='score'. "
                "Valid: routing='error' with it, which needs compensation, or budget='row'."
            )
        if self.selection()[1] is None:
            raise ConfigError(
                "budget='layer' divides a density among the heads of a layer, but top_p decides how much is selected. "
                "Valid: a density with it, or budget='row'."
            )

    def _check_target(self) -> None:
        if self.budget != "layer":
            raise ConfigError(
                f"target_error={self.target_error} moves the density that the heads of a layer share, but "
                "budget='row'. Valid: budget='layer' with it, the default of compensation='first_order' without top_p."
            )
        if self.density_schedule() is not None:
            raise ConfigError(
                f"target_error={self.target_error} and density={self.density!r}: each says what the density of a step "
                "is. Valid: one of them; a single number is the density that the first sparse step begins with."
            )

    def _check_inductor_mode(self, mode: str) -> None:
        # Imported here: reading a configuration must not cost the import of Inductor.
        from torch._inductor import list_mode_options

        valid = list(list_mode_options())
        if mode not in valid:
            raise ConfigError(f"inductor_mode={mode!r} is not valid. Valid: {', '.join(map(repr, valid))} or None.")
        if self.inner_backend != "inductor":
            raise ConfigError(
                f"inductor_mode={mode!r} needs inner_backend='inductor', but inner_backend={self.inner_backend!r}. "
                "Valid: inductor_mode=None with another backend."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None = None) -> Svg2Config:
        """Read the options of ``torch.compile(model, backend="svg2", options=...)``.

        Args:
            options: option name (or its spelling in the SVG2 scripts) -> plain scalar, also as a string ("0.9",
                "true", "none"). A preset is applied first; options that are given beside it override it.

        Raises:
            ConfigError: (a ValueError) for an unknown option, a wrong type, a value out of range, one option under two
                spellings, an unknown preset, or options that contradict each other.
        """
        named = canonical_names(options or {})
        values = {name: parse_value(name, value, given) for name, (given, value) in named.items()}
        preset = values.get("preset")
        if preset is None:
            return cls(**values)
        chosen = load_preset(preset)
        return cls(**{**chosen.settings, **values, "preset": chosen.name})

    def replace(self, **changes: Any) -> Svg2Config:
        """These settings with some of them changed, checked like new ones.

        Raises:
            ConfigError: as :meth:`from_options`.
        """
        values = {name: value for name, (_, value) in canonical_names(changes).items()}
        if "compensation" in values:
            values.setdefault("routing", "auto")  # the old routing belongs to the old compensation
            if self.dense_layers == DEFAULT_DENSE_LAYERS[self.compensation]:
                values.setdefault("dense_layers", "auto")
        if "dense_timesteps" in values:
            values.setdefault("dense_steps", "auto")
        mass_decides = "top_p" in values or ("density" in values and values["density"] in (None, "none"))
        if mass_decides or {"compensation", "routing"} & values.keys():
            values.setdefault("budget", "auto")
        return dataclasses.replace(self, **values)

    def site_policy(self) -> SitePolicy:
        """The part of the settings that decides which attentions become sparse."""
        from svg2_compile.passes.sites import SitePolicy

        return SitePolicy(**self._only(SitePolicy))

    def sparsity_policy(self) -> SparsityPolicy:
        """The part of the settings that says what a sparse attention computes."""
        from svg2_compile.passes.sparsify import SparsityPolicy

        return SparsityPolicy(**self._only(SparsityPolicy))

    def selection(self) -> tuple[float, float | None]:
        """top_p and density as they take effect, a schedule by its mean; a density of None leaves the decision to
        top_p."""
        density, schedule = self.density, self.density_schedule()
        if schedule is not None:
            density = schedule.mean
        elif isinstance(density, str):  # "auto"
            density = DEFAULT_DENSITY.get(self.compensation) if self.top_p is None else None
        return DEFAULT_TOP_P if self.top_p is None else self.top_p, density

    def density_schedule(self) -> DensitySchedule | None:
        """The densities of the sparse steps; None where they all have one, or a mass decides."""
        return DensitySchedule.read(self.density)

    def _only(self, policy: type) -> dict[str, Any]:
        """The settings that a policy, a dataclass of the passes, has fields for."""
        top_p, density = self.selection()
        values = {**self.to_dict(), "top_p": top_p, "density": density}
        return {item.name: values[item.name] for item in fields(policy)}

    def to_dict(self) -> dict[str, Any]:
        """Every setting as a plain scalar, ready for JSON and for :meth:`from_options`."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def cache_key(self) -> str:
        """A short stable text that changes with any setting and with the version of this package."""
        # The type tells dense_steps=0 from 0.0: equal as numbers, a count and a fraction.
        content = {name: [type(value).__name__, value] for name, value in self.to_dict().items()}
        text = json.dumps({"version": package_version(), "config": content}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def package_version() -> str:
    """The version of svg2_compile that is installed."""
    try:
        return importlib.metadata.version("svg2-compile")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # used from a source tree that is not installed
