"""The transformers plug-in: ``AutoModelForCausalLM.from_pretrained(pack)``.

transformers builds the model on the meta device, the quantizer below takes the experts' weights
away and puts packed modules in place, and transformers then loads the trunk as it always does.
``config.json`` of a pack carries a model type that transformers does not know by itself, so that
without this plug-in it refuses a pack instead of running it on random experts.
"""

from __future__ import annotations

import logging
import re
import weakref
from contextlib import ExitStack
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moepack_formats import FORMAT_VERSION
from moepack_formats.errors import FormatError, UsageError
from moepack_formats.pack import Pack

from ..cache.residency import Residency, open_budget, open_residency
from ..experts import IMPLEMENTATION, find_experts, register_experts_function
from ..experts_compute import ExpertsCompute
from ..gpu.compute import DeviceCompute
from ..gpu.device_cache import DeviceCache
from ..gpu.speculator import DeviceSpeculator
from ..gpu.tier import DeviceTier, Fixed, on_cpu, open_tier, resolve_device, warn_unused
from ..hub.cache import complete_snapshot
from ..kernels import select
from ..kernels.native_engine import NativeEngine
from ..memory.context_memory import context_nbytes, context_tokens
from ..options import RuntimeOptions, current_options
from ..prefetch.guesses import Speculator
from ..routing.cache_bias import CacheBias
from ..statistics import Statistics
from ..trunk.files import check_fits, check_trunk, copy_out_of_files, trunk_nbytes
from ..trunk.packed_modules import leave_embeddings, swap_modules
from .pack_checks import check_layers, check_pins
from .pack_config import MODEL_TYPE
from .refusals import refuse
from .turns import Turns, take_turns

if TYPE_CHECKING:  # this module is imported while transformers is still importing its own
    from transformers import PreTrainedModel

    from ..gpu.compiled import CompiledTrunk
    from ..tape import TapeForward


_log = logging.getLogger(__name__)

model_is_built: ContextVar[bool] = ContextVar("moepack_model_is_built", default=False)
"""Whether the ``from_pretrained`` under way has made the model and come to its weights."""


class PackRuntime:
    """What a loaded pack consists of besides its modules; ``model.moepack``.

    Attributes:
        pack: The open pack.
        stats: Counters.
        residency: Brings the records.
        speculator: Guesses experts; None without prefetch.
        bias: Nudges routing towards resident experts; None unless that was asked for.
        engine: Computes with packed weights.
        adapters: The experts modules, without their weights.
        layers: What each of them computes with on the CPU.
        device_layers: The same on a GPU.
        device: Where the trunk computes.
        tier: Experts on a GPU; None on the CPU.
        tape: Plays tokens; None where nothing is recorded.
        compiled: Decodes on a GPU if it was asked for; None otherwise.
        budget: What the process may take, and what it needs.
        fixed: What takes GPU memory besides experts; None on the CPU.
        turns: Lets one thread at a time compute.
        left_in_file: Trunk tensors that are read piece by piece instead of kept in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pack: Pack,
        stored: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        opened: ExitStack,
    ) -> None:
        """Install what computes a pack in a model on the meta device.

        Args:
            model: The model.
            pack: Its pack.
            stored: Shapes of the trunk's tensors.
            dtype: What the trunk computes in.
            opened: Takes what has to be closed when loading fails after all.
        """
        self.pack, self.stats = pack, Statistics()
        self.fixed: Fixed | None = None
        self.device_layers: list[DeviceCompute] = []
        self.tape: TapeForward | None = None
        self.compiled: CompiledTrunk | None = None
        self.left_in_file: list[str] = []
        self.turns = Turns()
        self.tier: DeviceTier | None = None
        options = current_options()
        self.adapters = adapters = find_experts(model)
        check_layers(model, pack, adapters)
        check_pins(pack, options.pins)
        for adapter in adapters:
            adapter.strip()
        self.device = resolve_device(options)
        self.engine = select(
            options.engine, options.activations, options.threads, device=self.device
        )
        on_device = not on_cpu(options)
        if on_device:  # before there are modules that cannot run on the meta device
            tokens = context_tokens(model, options.context)
            context = context_nbytes(model, adapters, tokens)
        swap_modules(model, pack.manifest.packed, dtype, self.engine)
        check_fits(model, stored)
        self.layers: list[ExpertsCompute] = []
        self.bias: CacheBias | None = None
        self.budget = open_budget(pack, options)
        if on_device:
            self.fixed = Fixed(trunk_nbytes(model, dtype), context, tokens)
            self._install_on_device(model, options, self.fixed, opened)
            return
        warn_unused(options)
        if not self.budget.holds(trunk_nbytes(model, dtype)):
            self.left_in_file = leave_embeddings(model, pack)
        self.budget = self.budget.with_trunk(trunk_nbytes(model, dtype))
        self.residency: Residency = open_residency(pack, options, self.budget, self.stats)
        opened.callback(self.residency.close)
        shared = adapters, self.residency, self.stats
        self.bias = CacheBias(*shared, options.cache_bias) if options.cache_bias else None
        self.speculator: Speculator | None = None
        if options.prefetch:
            self.speculator = Speculator(model, *shared, self.bias)
        for layer, adapter in enumerate(adapters):
            compute = ExpertsCompute(
                layer,
                adapter,
                pack.layers[layer],
                self.residency,
                self.speculator,
                self.stats,
                self.engine,
                self.bias,
            )
            self.layers.append(compute)
            adapter.install(compute)
        if self.bias is not None:
            self.bias.install(model)

    def _install_on_device(
        self, model: PreTrainedModel, options: RuntimeOptions, fixed: Fixed, opened: ExitStack
    ) -> None:
        """Experts in GPU memory, beside what is ``fixed``.

        Raises:
            UsageError: An option that is only for the CPU.
        """
        if options.cache_bias:
            raise UsageError("routing is nudged on the CPU only", remedy="leave out --cache-bias")
        tier = open_tier(self.pack, options, self.device, fixed, self.adapters, self.stats)
        opened.callback(tier.residency.close)
        self.tier, self.residency, self.speculator = tier, tier.residency, None
        guesses = None
        if options.prefetch and isinstance(tier.residency, DeviceCache):
            shared = self.adapters, tier.residency, self.stats
            guesses = DeviceSpeculator(model, *shared, clock=tier.link.clock)
            self.speculator = guesses
        for layer, adapter in enumerate(self.adapters):
            compute = DeviceCompute(
                layer,
                adapter,
                self.pack.layers[layer],
                tier.residency,
                guesses,
                self.stats,
                self.engine,
                tier.link,
                tier.helper,
            )
            adapter.install(compute)
            self.device_layers.append(compute)

    def record_decoding(self, model: PreTrainedModel) -> None:
        """Let the native library decode, where the model can be recorded."""
        from ..tape import install  # needs all of transformers

        # A bias decides anew for every token what a router gives out.
        if self.tier is not None or self.bias is not None or not current_options().tape:
            return
        if isinstance(self.engine, NativeEngine):
            self.tape = install(model, self.layers, self.engine, self.speculator, self.stats)

    def compile_decoding(self, model: PreTrainedModel) -> None:
        """Let ``generate()`` decode with CUDA graphs, if that was asked for; weights are there."""
        if self.tier is None or self.fixed is None or not current_options().compile:
            return
        from ..gpu.compiled import CompiledTrunk  # needs torch's compiler

        guesses = cast("DeviceSpeculator | None", self.speculator)
        parts = self.adapters, self.device_layers, guesses, self.tier.link
        self.compiled = CompiledTrunk(model, *parts, self.fixed.tokens)

    def take_turns(self, model: PreTrainedModel) -> None:
        """Let one thread at a time call the model."""
        # A graph cannot wait: where passes are compiled, texts take turns.
        take_turns(model, "generate" if current_options().compile else "forward", self.turns)

    def close(self) -> None:
        """End threads and close files."""
        _close(self.residency, self.pack, self.turns)


@register_quantization_config(MODEL_TYPE)
class MoepackConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a pack's ``config.json``."""

    def __init__(self, format_version: int = FORMAT_VERSION, **unknown: Any) -> None:
        self.quant_method = cast(Any, MODEL_TYPE)
        self.format_version = format_version
        unknown.pop("quant_method", None)
        if unknown:
            raise FormatError(
                f"unknown field {sorted(unknown)[0]!r}", where="config.json: quantization_config"
            )
        if format_version != FORMAT_VERSION:
            raise FormatError(
                "unknown format version",
                where="config.json",
                wanted=FORMAT_VERSION,
                got=format_version,
                remedy="upgrade moepack",
            )


@register_quantizer(MODEL_TYPE)
class MoepackQuantizer(HfQuantizer):
    """Prepares a model on the meta device for the weights of a pack."""

    requires_calibration = True  # packs are made by `moepack convert`, never while loading
    _compiles = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse device maps: where a pack runs is an option of its own.

        Raises:
            UsageError: A device map that names anything but the CPU.
        """
        device_map = kwargs.get("device_map")
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            if place not in (None, "cpu", torch.device("cpu")):
                raise UsageError(
                    "packs take no device map",
                    got=f"device_map {place!r}",
                    remedy='load the pack inside moepack.options(device="cuda")',
                )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the trunk computes in; see :class:`~moepack_runtime.options.RuntimeOptions`.

        transformers asks for the checkpoint's dtype unless it is told another, and does not say
        which it was. On CPUs 16 bits are slower and less exact, and nothing is recorded.
        """
        options = current_options()
        on_cpu = resolve_device(options).type == "cpu"
        found = options.dtype or (torch.float32 if on_cpu else dtype)
        if found is not dtype:
            remedy = "moepack.options(dtype=...) sets another"
            _log.info("the trunk computes in %s, not in %s: %s", found, dtype, remedy)
        return found

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> PreTrainedModel:
        model_is_built.set(True)
        if not checkpoint_files:
            raise UsageError("a pack is loaded from its folder", remedy="use from_pretrained(pack)")
        # Not resolved: in a Hub cache the links' folder is the pack, not the blobs' folder.
        folder = Path(checkpoint_files[0]).parent
        complete_snapshot(folder)
        with ExitStack() as opened:
            pack = Pack(folder)
            opened.callback(pack.close)
            stored = check_trunk(pack)
            runtime = PackRuntime(model, pack, stored, dtype or model.dtype, opened)
            _untie_packed(model, pack)
            if runtime.left_in_file:
                # Names for patterns, and on this model alone: the class serves others too.
                known = model._keys_to_ignore_on_load_unexpected or ()
                names = [re.escape(name) for name in runtime.left_in_file]
                cast(Any, model)._keys_to_ignore_on_load_unexpected = {*known, *names}
            register_experts_function()
            model.set_experts_implementation(IMPLEMENTATION)
            cast(Any, model).moepack = runtime
            if model.base_model is not model and not current_options().compile:
                take_turns(model.base_model, "forward", runtime.turns)
            runtime.record_decoding(model)
            runtime.take_turns(model)
            # Not runtime.close: the runtime knows the model, and would keep it alive.
            weakref.finalize(model, _close, runtime.residency, pack, runtime.turns)
            opened.pop_all()  # from here on all of it ends with the model
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        """The trunk goes to its device, and out of the mapped files; nothing is trained."""
        # A pass outside no_grad() would keep every intermediate for a backward pass.
        model.requires_grad_(False)
        device: torch.device = cast(Any, model).moepack.device
        if device.type != "cpu":
            cast(Any, model).to(device)
        else:
            copy_out_of_files(model)
        runtime: PackRuntime = cast(Any, model).moepack
        runtime.compile_decoding(model)
        refuse(model)
        self._compiles = runtime.compiled is not None and runtime.compiled.refusal is None
        return model

    def update_weight_conversions(self, weight_conversions: Any, model: nn.Module) -> list[Any]:
        """None: the trunk is stored under the model's own names."""
        return []

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """A loaded pack cannot be saved again by transformers."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate()`` may compile: with what there is on a GPU, if that was asked for.

        transformers asks once the model is loaded.
        """
        return self._compiles

    @property
    def is_trainable(self) -> bool:
        """Packs are for inference."""
        return False


def _close(residency: Residency, pack: Pack, turns: Turns) -> None:
    if not turns.in_this_process:  # a child, which has none of the threads
        return
    residency.close()
    pack.close()


def _untie_packed(model: PreTrainedModel, pack: Pack) -> None:
    """Packed modules share their codes themselves; transformers must not look for their weights."""
    tied: dict[str, str] = model.all_tied_weights_keys
    for target, source in list(tied.items()):
        names = [key.removesuffix(".weight") for key in (target, source)]
        packed = [name for name in names if name in pack.manifest.packed]
        if packed:
            del tied[target]
