"""What the commands leave out of transformers, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from moepack_runtime.loading import load_pack
from tests.packs import make_pack

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "tests" / "assets" / "tiny-moe"

LEFT_OUT = ("torch._inductor", "torch.distributed.tensor", "hqq", "sympy.core")


def run(program: str, *words: object) -> str:
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_tokens_without_the_compiler(tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    make_pack(TINY, pack, attn_bits=4, expert_bits=3, quantizer="rtn")
    keywords = {"max_new_tokens": 8, "do_sample": False}
    program = f"""if True:
        import sys, torch
        from moepack_runtime.lean_imports.lean_transformers import import_transformers
        import_transformers()
        from moepack_runtime.loading import load_pack
        model = load_pack(sys.argv[1])
        print(model.generate(torch.tensor([[5, 9, 2]]), **{keywords})[0].tolist())
        print([name for name in {LEFT_OUT} if name in sys.modules])
    """
    tokens, left_in = run(program, pack).splitlines()
    wanted = load_pack(pack).generate(torch.tensor([[5, 9, 2]]), **keywords)
    assert tokens == str(wanted[0].tolist())
    assert left_in == "[]"


def test_every_family_runs() -> None:
    program = """if True:
        from moepack_runtime.lean_imports.lean_transformers import import_transformers
        import_transformers()
        import torch
        from tests import families
        for family in sorted(families.FAMILIES):
            with torch.no_grad():
                logits = families.random_model(family)(families.tokens(batch=1, length=4)).logits
            print(family, bool(torch.isfinite(logits).all()))
    """
    lines = run(program).splitlines()
    assert len(lines) > 20
    assert all(line.endswith("True") for line in lines)


def test_a_transformers_that_needs_the_compiler() -> None:
    """It is imported as usual, and told the truth about what is there."""
    program = """if True:
        import sys
        from moepack_runtime.lean_imports import lean_transformers as lean_imports
        real, calls = lean_imports._import, []
        def fussy():
            calls.append(sys.modules.get("torch._dynamo"))
            if len(calls) == 1:
                raise ImportError("cannot import name 'config' from 'torch._dynamo'")
            real()
        lean_imports._import = fussy
        lean_imports.import_transformers()
        import torch, transformers.utils
        print(calls[0] is not None, calls[1], transformers.utils.is_torch_flex_attn_available())
        print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
    """
    assert run(program).split() == ["True", "None", "True", "2.0"]


def test_symbolic_sizes_are_there_for_who_asks() -> None:
    """The stand-ins answer for numbers as the real modules do, and give way to them."""
    program = """if True:
        import importlib, sys
        from moepack_runtime.lean_imports.lean_transformers import import_transformers
        import_transformers()
        from moepack_runtime.lean_imports.plain_sizes import _OF_SHAPES
        name = "torch.fx.experimental.symbolic_shapes"
        stand_in = sys.modules[name]
        del sys.modules[name]
        real = importlib.import_module(name)
        pairs = [(3, 3), (3, 4), ((2, 3), (2, 3)), ((2, 3), [2, 4]), ((2,), (2, 3))]
        for a, b in pairs:
            assert stand_in.sym_eq(a, b) == real.sym_eq(a, b)
        for known in set(_OF_SHAPES) - {"sym_eq", "is_nested_int"}:
            for answer in (True, False):
                assert getattr(stand_in, known)(answer) == getattr(real, known)(answer), known
        assert stand_in.is_nested_int(3) == real.is_nested_int(3)
        assert stand_in.sym_or(False, True, False) and not stand_in.sym_and(True, False)
        assert stand_in.ShapeEnv is real.ShapeEnv
        import sympy
        print(sympy.Integer(2) + sympy.Symbol("x"))
    """
    assert run(program) == "x + 2\n"
