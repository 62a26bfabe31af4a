"""Where the time of played tokens goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..kernels.native_interface import ExpertsLayer
from .steps import Kv, Latent, NativeStep, Op

_NAMES = {
    Op.PACKED: "packed matrices",
    Op.EXPERTS: "experts",
    Op.APPEND: "attention",
    Op.ATTEND: "attention",
    Op.ATTEND_LATENT: "attention",
    Op.PYTHON: "steps in Python",
}
_HEAD, _REST, _AROUND = "head", "norms, routers and the like", "around the steps"


@dataclass
class Part:
    """One kind of work, all tokens together.

    Attributes:
        seconds: What it took.
        nbytes: Bytes of weights, or of keys and values, that it read; 0 where that is not counted.
    """

    seconds: float = 0.0
    nbytes: int = 0


@dataclass
class Profile:
    """Where the time of played tokens goes.

    Attributes:
        record_nbytes: Of an expert's record, in the mean.
        tokens: Played tokens.
        seconds: What they took in all.
        parts: By name: the experts, the head, the other packed matrices, attention with its cache,
            what lies between those, steps that Python does, and what is around the steps.
    """

    record_nbytes: float
    tokens: int = 0
    seconds: float = 0.0
    parts: dict[str, Part] = field(default_factory=dict)

    def add(self, steps: Sequence[NativeStep], taken: Sequence[float], seconds: float) -> None:
        """One more token.

        Args:
            steps: The tape.
            taken: Seconds of each step.
            seconds: Seconds of the token.
        """
        head = max((i for i, step in enumerate(steps) if step.op == Op.PACKED), default=None)
        for number, (step, time) in enumerate(zip(steps, taken, strict=True)):
            name = _HEAD if number == head else _NAMES.get(Op(step.op), _REST)
            part = self.parts.setdefault(name, Part())
            part.seconds += time
            part.nbytes += self._nbytes(step)
        around = self.parts.setdefault(_AROUND, Part())
        around.seconds += seconds - sum(taken)
        self.tokens += 1
        self.seconds += seconds

    def _nbytes(self, step: NativeStep) -> int:
        if step.op == Op.PACKED:
            return int(step.number[1])
        if step.op == Op.EXPERTS:
            return int(ExpertsLayer.from_address(step.extra).chosen * self.record_nbytes)
        if step.op == Op.ATTEND_LATENT:
            latent = Latent.from_address(step.extra)
            kv = Kv.from_address(latent.kv)
            return _cached_nbytes(kv) + latent.weights_nbytes(int(step.number[0]), kv.key_width)
        if step.op == Op.ATTEND:
            kv = Kv.from_address(step.extra)
            return _cached_nbytes(kv, window=int(step.number[1]))
        return 0


def _cached_nbytes(kv: Kv, window: int = 0) -> int:
    tokens = kv.end + 1
    if window > 0:
        tokens = min(tokens, window)
    return int(kv.heads * tokens * (kv.key_width + kv.value_width) * (2 if kv.half else 4))
