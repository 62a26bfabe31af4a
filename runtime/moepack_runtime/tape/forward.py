"""The forward of a loaded pack: played where it can be, transformers' own elsewhere."""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..experts_compute import ExpertsCompute
from ..kernels.native_engine import NativeEngine
from ..prefetch.early_routers import Answers
from ..prefetch.guesses import Speculator
from ..statistics import Statistics
from ..trunk.packed_modules import PackedEmbedding, PackedLinear, TiedHead
from .attention import recorded_attention
from .caches import odd_kind, take_over
from .kv import GrowingLayer
from .kv_indexed import GrowingIndexedLayer, picked_at_most
from .overlap import reads_early, without_asking
from .player import Player
from .profile import Profile
from .record import CannotRecord, Recorder, Step, differences, reading_position, recording
from .seen import Weights, Wishes
from .states import Home, state_holders
from .torch_threads import TorchThreads

_log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Difference of logits, relative to the largest, at which a recording is not believed."""

_IGNORED = {"use_cache", "logits_to_keep", "return_dict", "cache_position", "tokenizer"}
"""Arguments of forward that make no difference to one token. The tokenizer is for stop texts;
generate() hands it on to the model."""

_REPLACED_EARLY = 4
"""Recordings in a row that were of weights replaced before so many tokens were played: the next
would not last either."""

_GROWING_ROPE = ("dynamic", "longrope")
"""Position embeddings that change with the length, which Python decides."""


class TapeForward:
    """Decides, for every call of a model's forward, who does it.

    Args:
        model: The model.
        computes: What computes the experts of each layer.
        engine: The native engine.
        speculator: Guesses experts from what the layers read; None without prefetch.
        stats: Does not count the passes that are recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        computes: Sequence[ExpertsCompute],
        engine: NativeEngine,
        speculator: Speculator | None,
        stats: Statistics,
    ) -> None:
        # Weakly: the model owns this object, and must end with its last other owner.
        self._model = weakref.ref(model)
        self._forward: Callable[..., Any] = type(model).forward
        self._computes, self._engine, self._stats = computes, engine, stats
        self._wishes = Wishes(model)
        self._weights: Weights | None = None  # as they were recorded
        self._played = self._replaced_early = 0
        self._speculator = speculator
        self._answers: Answers = {}
        self.torch_threads = TorchThreads(engine)
        self._player: Player | None = None
        self._lean: Player | None = None  # asks no routers ahead
        self._home: Home | None = None  # of the states that the players read and write
        self._output: type[Any] | None = None
        self._why_not: str | None = None
        self._passed_by: str | None = None  # kind of cache of a token that could not be played

    @property
    def refusal(self) -> str | None:
        """Why transformers' own code decodes, or None where tokens are played or none has come."""
        if self._why_not is not None:
            return self._why_not
        if self._player is None and self._passed_by is not None:
            return f"its cache is of a kind that is not played ({self._passed_by})"
        return None

    def describe(self) -> str:
        """How tokens are decoded, for a person."""
        if self.refusal is not None:
            return f"decoding by transformers' own code: {self.refusal}"
        if self._player is None:
            return "decoding not recorded yet"
        return f"decoding recorded, {self._player.native_share:.0%} native"

    def profile(self, profile: Profile | None) -> None:
        """Write the times of tokens that are played from now on there, or nowhere.

        Nothing is written where transformers' own code decodes.
        """
        for player in (self._player, self._lean):
            if player is not None:
                player.profile = profile

    @property
    def playing(self) -> bool:
        """Whether tokens are played."""
        return self._player is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``model.forward``."""
        # Memory that was taken in inference mode cannot be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            found = None if self._why_not is not None else self._one_token(args, kwargs)
        self.torch_threads.expect(played=found is not None and self._player is not None)
        if found is None or self._looking():
            return self._forward(self._model(), *args, **kwargs)
        token, layers = found
        states = state_holders(kwargs["past_key_values"])
        position = layers[0].get_seq_length()
        with torch.inference_mode(False), torch.no_grad():
            if self._weights is not None and not self._weights.same:
                self._begin_again()
            if self._player is None and self._why_not is None:
                try:
                    with self._engine.float_activations(), self._stats.uncounted():
                        self._record(token, layers, kwargs["past_key_values"])
                except CannotRecord as reason:
                    _rewind(layers, position)
                    self._give_up(str(reason))
                except BaseException:  # Ctrl-C, a record that cannot be read
                    _rewind(layers, position)
                    raise
            if self._player is not None:
                assert self._home is not None
                self._home.move_in(states)
                logits = self._play(self._best_player(), token, position, layers)
                self._played += 1
        if self._player is None:
            self.torch_threads.expect(played=False)
            return self._forward(self._model(), *args, **kwargs)
        assert self._output is not None
        for compute in self._computes:
            compute.settle()
        return self._output(logits=logits, past_key_values=kwargs["past_key_values"])

    def _one_token(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, list[GrowingLayer]] | None:
        """The token and the cache, if the call is for one token after others and nothing else."""
        ids = kwargs.get("input_ids")
        if any(compute.watcher is not None for compute in self._computes):
            return None  # which a played token might pass by
        if args or not isinstance(ids, Tensor) or ids.shape != (1, 1):
            return None
        model = cast(Any, self._model())
        if self._wishes.more_than_logits(model):
            return None
        for name, value in kwargs.items():
            known = name in _IGNORED or name in (
                "input_ids",
                "past_key_values",
                "attention_mask",
                "position_ids",
            )
            if not known and value is not None and value is not False:
                return None
        if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
            return None
        layers = take_over(kwargs.get("past_key_values"), half=self._engine.int8)
        if layers is None:
            cache = kwargs.get("past_key_values")
            self._passed_by = None if cache is None else odd_kind(cache)
            return None
        if self._home is not None and not self._home.fits(state_holders(kwargs["past_key_values"])):
            return None
        length = layers[0].get_seq_length()
        if any(isinstance(layer, GrowingIndexedLayer) for layer in layers):
            limit = picked_at_most(self._model())
            # Two tokens are recorded.
            if limit is not None and length + (2 if self._player is None else 1) > limit:
                return None
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        if positions is not None and (positions.shape != (1, 1) or int(positions) != length):
            return None
        if positions is None and kwargs["past_key_values"].get_seq_length() != length:
            return None  # where the first layer has states in a cache of the model's own
        if mask is not None and not (
            isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())
        ):
            return None
        token = int(ids)
        if (
            not 0 <= token < model.get_input_embeddings().num_embeddings
        ):  # the embedding's own error says so
            return None
        return token, layers

    def _record(self, token: int, layers: list[GrowingLayer], cache: Cache) -> None:
        """Record a token and another one after it, then see that both are played right.

        Args:
            token: Its number.
            layers: The growing layers of the cache.
            cache: Is left as it was found.

        Raises:
            CannotRecord: The model does something that a recording cannot hold.
        """
        # Activations are not rounded to 8 bits meanwhile: a difference in the last bit can change a
        # code, and many of these look like an error.
        model = cast(nn.Module, self._model())
        _check(model)
        weights = Weights(model)
        start, states = layers[0].get_seq_length(), state_holders(cache)
        home = Home(states)
        other = (token + 1) % cast(Any, model).config.get_text_config().vocab_size
        token_at = torch.tensor([[token]])
        position_at = torch.tensor([[start]])
        passes = []
        with home.lent(states):
            for number, ids in enumerate((token, other)):
                token_at.fill_(ids)
                position_at.fill_(start + number)
                recorder = Recorder()
                self._answers = {}
                output = self._recorded(model, recorder, token_at, position_at, layers, cache)
                home.take_back(states, recorder.steps)
                steps = recorder.steps
                if any(isinstance(layer, GrowingIndexedLayer) for layer in layers):
                    if picked_at_most(model) is None:
                        raise CannotRecord("the config does not say how many an indexer picks")
                    kept = (output.logits, *home.tensors, *self._answers.values())
                    steps = without_asking(steps, kept)
                passes.append((steps, output, output.logits.clone()))
        _rewind(layers, start)
        (first, _, wanted), (second, output, wanted_next) = passes
        first, second = reading_position((first, second), start, position_at)
        reason = differences(first, second)
        if reason is not None:
            raise CannotRecord(reason)
        if any(compute.reads for compute in self._computes):
            second = reads_early(second)

        def player_of(steps: Sequence[Step], keep: Sequence[Tensor] = ()) -> Player:
            player = Player(
                steps,
                token_at,
                position_at,
                output.logits,
                layers,
                self._engine,
                keep=[*keep, *home.tensors],
            )
            home.load(states)
            for number, (ids, logits) in enumerate(((token, wanted), (other, wanted_next))):
                got = self._play(player, ids, start + number, layers)
                error = (got - logits).abs().max() / logits.abs().max().clamp(min=1e-6)
                if not error <= TOLERANCE:
                    _rewind(layers, start)
                    raise CannotRecord(f"played logits differ by {float(error):.1e}")
            _rewind(layers, start)
            return player

        if self._answers and not any(compute.reads for compute in self._computes):
            self._lean = player_of(without_asking(second, (output.logits, *home.tensors)))
        self._player = player_of(second, list(self._answers.values()))
        self._home, self._weights = home, weights
        for compute in self._computes:
            compute.settle()
        self._output = type(output)
        _log.info("%s", self.describe())

    def _begin_again(self) -> None:
        """Forget the recording: the model's weights or modules are not those that it reads."""
        self._player = self._lean = self._home = self._weights = None
        self._wishes.look_again(cast(nn.Module, self._model()))
        self._replaced_early += 1
        if self._played >= _REPLACED_EARLY:
            self._replaced_early = 0
        self._played = 0
        if self._replaced_early == _REPLACED_EARLY:
            self._give_up("its weights are replaced all the time")

    def _looking(self) -> bool:
        """Whether the routers are yet to be found, in a pass of transformers' own."""
        return self._speculator is not None and not self._speculator.routers.found

    def _best_player(self) -> Player:
        assert self._player is not None
        if self._lean is not None and all(compute.all_in_place for compute in self._computes):
            return self._lean
        return self._player

    def _play(
        self, player: Player, token: int, position: int, layers: list[GrowingLayer]
    ) -> Tensor:
        if self._speculator is None:
            return player.play(token, position, layers)
        with self._speculator.answered(self._answers):
            return player.play(token, position, layers)

    def _ask_ahead(self, layer: int) -> None:
        """Make asking the next routers a part of the recording."""
        if self._speculator is not None:
            self._answers |= self._speculator.ask_ahead(layer)

    def _recorded(
        self,
        model: nn.Module,
        recorder: Recorder,
        token: Tensor,
        position: Tensor,
        layers: list[GrowingLayer],
        cache: Cache,
    ) -> Any:
        opaque: dict[nn.Module, str] = {}
        for module in model.modules():
            if isinstance(module, (PackedLinear, TiedHead)):
                opaque[module] = "packed"
            elif isinstance(module, PackedEmbedding):
                opaque[module] = "embed"
        try:
            with (
                recorded_attention(model, recorder, layers),
                recording(recorder, opaque, self._computes, self._ask_ahead),
            ):
                output = self._forward(
                    model,
                    input_ids=token,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                )
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise CannotRecord(f"{type(error).__name__}: {error}") from error
        extra = [
            name
            for name, value in output.items()
            if name not in ("logits", "past_key_values") and value is not None
        ]
        if extra:
            raise CannotRecord(f"the model also gives {extra[0]}")
        return output

    def _give_up(self, reason: str) -> None:
        self._why_not = reason
        _log.info("%s", self.describe())


def install(
    model: nn.Module,
    computes: Sequence[ExpertsCompute],
    engine: NativeEngine,
    speculator: Speculator | None,
    stats: Statistics,
) -> TapeForward:
    """Make a model's forward play tokens; what is not one token goes on as before."""
    tape = TapeForward(model, computes, engine, speculator, stats)

    @functools.wraps(type(model).forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return tape(*args, **kwargs)

    # generate() looks at the parameters' names, and must not find `self`.
    cast(Any, forward).__signature__ = inspect.signature(model.forward)
    model.forward = forward
    if hasattr(model, "generate"):
        _install_generate(model, tape)
    return tape


def _install_generate(model: nn.Module, tape: TapeForward) -> None:
    """Let generate() know how many threads torch needs."""
    original = cast(Any, type(model)).generate
    weak = weakref.ref(model)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with tape.torch_threads.generating():
            return original(weak(), *args, **kwargs)

    cast(Any, generate).__signature__ = inspect.signature(cast(Any, model).generate)
    cast(Any, model).generate = generate


def _check(model: nn.Module) -> None:
    """Refuse what a recording would get wrong without showing it."""
    config = cast(Any, model).config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(v for v in rope.values() if isinstance(v, dict))]
    for kind in kinds:
        if kind.get("rope_type") in _GROWING_ROPE:
            raise CannotRecord(f"{kind['rope_type']} position embeddings change with the length")
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        raise CannotRecord("the model takes no positions")


def _rewind(layers: list[GrowingLayer], length: int) -> None:
    for layer in layers:
        layer.rewind(length)
