"""Compiles a run's training step for chips that are not here.

A process of its own, because XLA's compilers are set up once in each, by the environment.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jax_model5.config import TrainConfig, parse, to_yaml
from jax_model5.errors import UserError, one_line_errors
from jax_model5.plan.chips import Chips, devices, parse_chips

# First what `jax_model5` hides from JAX: the kernels and the client of an absent GPU.
_WITH_PLUGINS = """
import contextlib, importlib, runpy
import jax
for name in ("cuda12", "cuda13"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"jax_plugins.xla_{name}")
runpy.run_module("jax_model5.plan.compiled", run_name="__main__", alter_sys=True)
"""


class DoesNotFit(Exception):
    """The step's temporaries are larger than the chip's memory."""

    def __init__(self, temporaries: float):
        super().__init__(f"{temporaries / 1e9:.1f} GB of temporaries")
        self.temporaries = int(temporaries)


def compile_for(chips: Chips, config: TrainConfig) -> tuple[dict[str, int], str]:
    """The step's memory by kind [bytes], and the program's text.

    Raises:
      DoesNotFit: XLA's compiler for TPUs makes no program that is larger than the chip's memory.
      UserError: the mesh does not fit the chips, XLA knows none such, or its compiler failed.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    absent = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": flags}
    absent["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # its lock is for chips that are there
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "config.yaml"
        path.write_text(to_yaml(config), encoding="utf-8")
        command = [sys.executable, "-c", _WITH_PLUGINS, chips.name, name, "--config", str(path)]
        done = subprocess.run(command, env=os.environ | absent, capture_output=True, text=True)
        if done.returncode:
            if found := re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMG])\)", done.stderr):
                raise DoesNotFit(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            words = [line for line in lines if line.startswith("error: ")] or lines[-1:]
            raise UserError(f"{words[0].removeprefix('error: ')}")
        memory = json.loads((folder / "memory.json").read_text())
        return memory, (folder / "program.txt").read_text()


def main() -> None:
    with one_line_errors():
        from jax_model5.programs import Programs  # after JAX's environment

        name, folder, *args = sys.argv[1:]
        config = parse(args, "jax_model5.plan")
        step: Any = Programs(config, devices=devices(parse_chips(name))).train_step
    memory = step.memory_analysis()
    kinds = ("argument", "output", "alias", "temp")
    found = {kind: getattr(memory, f"{kind}_size_in_bytes") for kind in kinds}
    Path(folder, "program.txt").write_text(step.as_text())
    Path(folder, "memory.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
