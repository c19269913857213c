"""The commands: import and export; `python -m jax_model5.huggingface`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_model5.errors import ArgumentParser, UserError, one_line_errors
from jax_model5.huggingface.exporting import export_weights
from jax_model5.huggingface.importing import import_weights


def require_new(out: Path) -> None:
    """Raises UserError when `out` holds something already."""
    try:
        is_new = not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(f"out={str(out)!r}: {error.strerror}; name another folder") from None
    if not is_new:
        raise UserError(f"out={str(out)!r}: is not an empty folder; name another")


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m jax_model5.huggingface", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    reads = commands.add_parser("import", help="GPT-2 weights -> a folder like a run's")
    weights = "a folder that save_pretrained wrote, or a name of the hub such as gpt2"
    reads.add_argument("weights", metavar="PATH_OR_NAME", help=weights)
    writes = commands.add_parser("export", help="a run's newest weights -> GPT-2's files")
    writes.add_argument("run", metavar="RUN", help="the run's workdir")
    size = "largest file, such as 500MB; default 5GB"
    writes.add_argument("--shard_size", default="5GB", help=size)
    for command in (reads, writes):
        command.add_argument("--out", metavar="DIR", required=True, help="a new or empty folder")
    return parser.parse_args(args)


def main() -> None:
    with one_line_errors():
        options = parse_args(sys.argv[1:])
        out = Path(options.out).expanduser()
        require_new(out)
        if options.command == "import":
            import_weights(options.weights, out)
        else:
            export_weights(options.run, out, options.shard_size)


if __name__ == "__main__":
    main()
