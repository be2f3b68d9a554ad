"""The wheel also gets the run notebooks of nbs/ and settings.ini; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithNotebooks(build_py):
    "Copies nbs/*.ipynb into the built package; an editable install reads them where they are."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for source, target in self.notebooks().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(str(source), target)

    def notebooks(self):
        "File in the checkout → file in the wheel."
        folder = Path(self.build_lib) / 'fdsl_nb' / 'notebooks'
        files = {p: str(folder / p.name) for p in sorted((HERE / 'nbs').glob('*.ipynb'))}
        return files | {HERE / 'settings.ini': str(folder / 'settings.template.ini')}

    def get_outputs(self, include_bytecode=True):
        ours = [] if self.editable_mode else [*self.notebooks().values()]
        return [*super().get_outputs(include_bytecode), *ours]


setup(cmdclass=dict(build_py=BuildWithNotebooks))
