"""The tokenizer of a source, as a pack of it will have it: code that comes with it is not run."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from moepack_formats import osio
from moepack_formats.errors import FormatError, UsageError
from moepack_runtime.loading import load_tokenizer

from .model_files import tokenizer_files
from .plan import ConversionPlan


def source_tokenizer(plan: ConversionPlan) -> Any | None:
    """The tokenizer of the source, or None when it has none.

    Raises:
        UsageError: transformers cannot read its files without the code that comes with them.
        FormatError: transformers cannot read its files.
    """
    folder = plan.checkpoint.folder
    files, names_code = tokenizer_files(folder)
    if not names_code:
        return load_tokenizer(folder)
    # transformers refuses files that name code before it looks whether it needs the code.
    config = plan.checkpoint.config | {"model_type": plan.model.config.model_type}
    with tempfile.TemporaryDirectory(prefix="moepack-") as name:
        for file, data in {**files, "config.json": json.dumps(config).encode()}.items():
            osio.write_file(Path(name) / file, data)
        try:
            return load_tokenizer(name)
        except FormatError as error:
            raise UsageError(
                "transformers cannot read the tokenizer without the code that comes with it",
                where=folder,
                got=error.__cause__,
                remedy="put a tokenizer.json beside it",
            ) from error
