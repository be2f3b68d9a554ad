"""papermill's plug-in of fdsl_nb: an entry point of the group `papermill.engine`.

papermill loads it before it reads its command line, for every notebook of everybody who shares the
environment. So it stands outside the package, imports nothing but papermill's engine, and imports
the package only for a notebook whose metadata says that it is one of the kit's.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from click import ClickException
from papermill.engines import NBClientEngine, papermill_engines
from papermill.iorw import papermill_io

PATHS = ('PAPERMILL_INPUT_PATH', 'PAPERMILL_OUTPUT_PATH')


def is_papermill() -> bool:
    "Is this process `papermill …` or `python -m papermill …`, and not a program that uses it?"
    if sys.argv[:1] != ['-m']:  # which Python puts there while it looks for the module
        return Path(sys.argv[0]).stem in ('papermill', 'papermill-script')
    before = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
    return before[-2:] == ['-m', 'papermill'] or before[-1:] == ['-mpapermill']


def may_be_ours(word: str) -> bool:
    "Is it the path of a notebook that names this package?"
    path = Path(word)
    return path.suffix == '.ipynb' and path.is_file() and b'"fdsl_nb"' in path.read_bytes()


def complete_command_line():
    "Adds the output path to a line that names only a run notebook of the kit; a slip ends it."
    if not is_papermill() or not any(map(may_be_ours, sys.argv[1:])):
        return
    from fdsl_nb.app.cli import completed_line

    try:
        sys.argv[1:] = completed_line(sys.argv[1:])
    except (TypeError, ValueError, OSError) as e:
        sys.exit(f'papermill: {e}')


@contextmanager
def environment(**values):
    "Sets variables for the kernels that start within the block; one of None is unset."
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values):
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def started_in() -> Path:
    "The folder from which papermill reads and writes; with --cwd, cells run in another one."
    files = papermill_io.get_handler('local')
    folder = files.cwd(None)
    files.cwd(folder)
    return Path(folder or '.')


def absolute(path: str) -> str | None:
    "A path on this machine as an absolute one; None for stdout, and for other places."
    if not path or path == '-' or '://' in path:
        return None
    return str((started_in() / path).resolve())


class RunEngine(NBClientEngine):
    "papermill's engine, which also tells the kernel where notebook and result are."

    @classmethod
    def execute_notebook(cls, nb, kernel_name, output_path=None, **options):
        "Checks the parameters of a run notebook, and executes it as papermill does."
        papermill = nb.metadata.papermill
        paths = [absolute(papermill.get(name)) for name in ('input_path', 'output_path')]
        if 'fdsl_nb' in nb.metadata and paths[0]:
            check(paths, papermill.get('parameters', {}))
        with environment(**dict(zip(PATHS, paths))):
            return super().execute_notebook(nb, kernel_name, output_path, **options)


def check(paths: list, parameters: dict):
    "One line for a slip, before a kernel starts; it is recorded in the run's folder."
    from fdsl_nb.app.parameters import check_values
    from fdsl_nb.core.folder import RunFolder, set_stopped

    given = {name: value for name, value in parameters.items() if name not in PATHS}
    try:
        check_values(Path(paths[0]), given)
    except (TypeError, ValueError, OSError) as e:
        folder = paths[1] and RunFolder(Path(paths[1]).parent)
        if folder and folder.path.is_dir() and folder.state in ('new', 'failed'):
            set_stopped(folder, e)
        raise ClickException(str(e)) from e


for name in (
    None,
    'nbclient',
):  # of an engine; None is the one that papermill uses if none is named
    papermill_engines.register(name, RunEngine)
complete_command_line()
