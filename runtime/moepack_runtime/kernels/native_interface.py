"""The C interface of the native library, as ctypes wants it: see ``csrc/moepack.h``."""

from __future__ import annotations

import ctypes

from moepack_formats.schemes import SCHEMES

ABI = 12
ACTIVATION_KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
SCHEME_NUMBERS = {name: number for number, name in enumerate(SCHEMES)}
REFUSALS = {1: "a bad argument", 2: "a short buffer", 3: "not supported on this machine"}


class Activation(ctypes.Structure):
    """``moepack_activation``."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
        ("up_offset", ctypes.c_float),
    )


class Layout(ctypes.Structure):
    """``moepack_layout``: where an expert's sub-tensors are in its record."""

    _fields_ = (
        ("first_scheme", ctypes.c_int32),
        ("down_scheme", ctypes.c_int32),
        ("first", ctypes.c_int64),
        ("first_bias", ctypes.c_int64),
        ("down", ctypes.c_int64),
        ("down_bias", ctypes.c_int64),
        ("nbytes", ctypes.c_int64),
    )


class ExpertsLayer(ctypes.Structure):
    """``moepack_experts_layer``: the experts of one layer whose records are at hand."""

    _fields_ = (
        ("records", ctypes.c_void_p),
        ("layouts", ctypes.c_void_p),
        ("experts", ctypes.c_int64),
        ("chosen", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("activation", Activation),
        ("gated", ctypes.c_int32),
        ("demanded", ctypes.c_int64),
    )


class Groups(ctypes.Structure):
    """``moepack_groups``: weights whose codes a quantizer sums up."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("measure", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("count", ctypes.c_int64),
    )


class Grid(ctypes.Structure):
    """``moepack_grid``: a scale and zero point of each group."""

    _fields_ = (
        ("inverse", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("top", ctypes.c_float),
    )


MOST_LEVELS, MOST_GROUP = 8, 128


class Levels(ctypes.Structure):
    """``moepack_levels``: what codes stand for in a scheme without minima."""

    _fields_ = (("count", ctypes.c_int32), ("level", ctypes.c_float * MOST_LEVELS))


class Neighbours(ctypes.Structure):
    """``moepack_neighbours``: stored scales and minima, and moves of them to try."""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("outer_scale", ctypes.c_void_p),
        ("minimum", ctypes.c_void_p),
        ("outer_minimum", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("moves", ctypes.c_void_p),
        ("moves_count", ctypes.c_int64),
        ("top", ctypes.c_float),
        ("code_top", ctypes.c_float),
    )


class Moves(ctypes.Structure):
    """``moepack_moves``: stored scales of grids without minima, and moves of them to try."""

    _fields_ = (
        ("scale", ctypes.c_void_p),
        ("outer_scale", ctypes.c_void_p),
        ("moves", ctypes.c_void_p),
        ("moves_count", ctypes.c_int64),
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
    )


class Columns(ctypes.Structure):
    """``moepack_columns``: what error feedback rounds, one column after the other."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("upper", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("inverse", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("minimum", ctypes.c_void_p),
        ("top", ctypes.c_float),
        ("levels", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("errors", ctypes.c_void_p),
    )


INT, LONG, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
SIGNATURES = {
    "moepack_isa": (ctypes.c_char_p, []),
    "moepack_set_isa": (INT, [ctypes.c_char_p]),
    "moepack_linear": (
        INT,
        [INT, POINTER, LONG, LONG, LONG, POINTER, LONG, POINTER, POINTER, INT, INT],
    ),
    "moepack_decode": (
        INT,
        [INT, POINTER, LONG, LONG, POINTER, LONG, LONG, INT, POINTER, INT],
    ),
    "moepack_experts": (
        INT,
        [*[POINTER] * 3, *[LONG] * 3, POINTER, INT, *[POINTER] * 3, INT, INT],
    ),
    "moepack_experts_tokens": (
        INT,
        [*[POINTER] * 3, *[LONG] * 3, POINTER, INT, *[POINTER] * 5, INT, INT],
    ),
    "moepack_sum_rows": (INT, [POINTER, LONG, LONG, LONG, POINTER, INT]),
    "moepack_tape_run": (LONG, [POINTER, LONG, LONG, INT, INT, POINTER]),
    "moepack_code_sums": (INT, [POINTER] * 5),
    "moepack_squared_steps": (INT, [POINTER] * 3),
    "moepack_level_sums": (INT, [POINTER] * 5),
    "moepack_best_neighbours": (INT, [POINTER] * 4),
    "moepack_best_moves": (INT, [POINTER] * 6),
    "moepack_feed_back": (INT, [POINTER]),
    "moepack_start_threads": (INT, [INT]),
    "moepack_read": (ctypes.c_uint64, [POINTER, LONG, INT]),
}
"""Result and arguments of every function but ``moepack_abi``, which is asked first."""
