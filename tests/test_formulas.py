"""The registry: families by entry points, by `@register`, and by module and class."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fdsl_nb.formulas.formula import Formula, formula, formula_class, formulas, knob, register

PUBLISHED = [
    'rcdb',
    'visualatom',
    'fractaldb',
    'ofdb2d',
    'onepfrac',
    'exfractaldb',
    'mvfractaldb',
    'ofdb3d',
]
SPOTS = '''
from dataclasses import dataclass
import numpy as np
from fdsl_nb.formulas.formula import Formula
@dataclass(frozen=True)
class Spots(Formula):
    "One lit pixel."
    name = 'spots'
    def category(self, c): return c
    def draw(self, c, k):
        one = np.eye(1, self.size ** 2, c + k, np.uint8)
        return one.reshape(self.size, self.size) * 255
'''


@pytest.fixture
def python(tmp_path):
    "Runs code where another package is installed, whose families are in its module `spots`."

    def run(code, entries, module=SPOTS):
        (tmp_path / 'spots.py').write_text(module)
        metadata = tmp_path / 'spots-1.0.dist-info'
        metadata.mkdir()
        (metadata / 'METADATA').write_text('Metadata-Version: 2.1\nName: spots\nVersion: 1.0\n')
        (metadata / 'entry_points.txt').write_text('[fdsl_nb.formulas]\n' + entries)
        path = os.pathsep.join(
            [str(tmp_path), str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
        )
        done = subprocess.run(
            [sys.executable, '-c', code],
            check=False,
            capture_output=True,
            text=True,
            env=os.environ | {'PYTHONPATH': path},
        )
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    return run


def test_the_published_families_come_first_and_lead_to_their_classes():
    assert formulas()[:8] == PUBLISHED
    for name in PUBLISHED:
        assert formula_class(name).name == name


@pytest.mark.process
def test_listing_names_loads_no_family(python):
    said = python(
        'import sys; from fdsl_nb.formulas.formula import formulas; formulas(); '
        "print([m for m in sys.modules if m.startswith('fdsl_nb.formulas.')])",
        '',
    )
    assert said == "['fdsl_nb.formulas.formula']"


@pytest.mark.process
def test_another_package_adds_a_family(python):
    said = python(
        'import sys; from fdsl_nb.formulas.formula import formula, formulas; '
        "print(formulas()[8:], 'spots' in sys.modules, "
        "formula('spots', size=8).render(0, 5).argmax(), 'spots' in sys.modules)",
        'spots = spots:Spots\n',
    )
    assert said == "['spots'] False 5 True"


@pytest.mark.process
def test_a_file_may_name_a_family_that_is_installed(python):
    said = python(
        'from fdsl_nb.formulas.formula import described_formula, formula; '
        "f = formula('spots', classes=3); print(described_formula(f.spec(), 'a file') == f)",
        'spots = spots:Spots\n',
    )
    assert said == 'True'


@pytest.mark.process
def test_no_other_package_takes_a_published_name(python):
    said = python(
        'from fdsl_nb.formulas.formula import formula_class, formulas; '
        "print(formula_class('rcdb').__module__, formulas().count('rcdb'))",
        'rcdb = spots:Spots\n',
    )
    assert said == 'fdsl_nb.formulas.contours 1'


@pytest.mark.process
@pytest.mark.parametrize(
    'entry, says',
    [
        (
            'spots = spots:np\n',
            (
                "TypeError: formula='spots' is no Formula; "
                'name a subclass of fdsl_nb.formulas.formula.Formula as module:Class'
            ),
        ),
        (
            'spots = spots:Sports\n',
            "ImportError: formula='spots': spots:Sports of the package spots cannot be loaded",
        ),
        (
            'spots = sports:Spots\n',
            "ImportError: formula='spots': sports:Spots of the package spots cannot be loaded",
        ),
    ],
)
def test_an_entry_that_leads_nowhere_is_named(python, entry, says):
    assert python(
        "from fdsl_nb.formulas.formula import formula; formula('spots')", entry
    ).startswith(says)


@pytest.mark.process
def test_a_class_may_be_entered_and_registered(python):
    module = SPOTS.replace('import Formula', 'import Formula, register').replace(
        '@dataclass', '@register\n@dataclass'
    )
    said = python(
        'import spots; from fdsl_nb.formulas.formula import formulas; '
        "print(formulas().count('spots'))",
        'spots = spots:Spots\n',
        module,
    )
    assert said == '1'


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_name_is_not_registered_again(name):
    with pytest.raises(
        ValueError,
        match=f'the name {name!r} is taken by fdsl_nb.formulas.*; give the class another name',
    ):
        register(type('Mine', (Formula,), {'name': name}))
    assert formulas().count(name) == 1


@dataclass(frozen=True)
class Steps(Formula):
    "Grey by class, brighter by instance: as little as a family may be."

    size: int = knob(8, 8, 64, 'side, pixels')
    name = 'steps'

    def category(self, c):
        return c

    def draw(self, c, k):
        return np.full((self.size, self.size), 10 * c + k, np.uint8)


def test_what_a_family_need_not_say():
    f = Steps(classes=3, instances=4)
    assert f.all_categories() == [0, 1, 2] and f.category_rows(2) == [dict(category=2)]
    assert f.category_rows(np.eye(2)) == [{'0': 1.0, '1': 0.0}, {'0': 0.0, '1': 1.0}]
    assert not f.by_chance and f.background == 0 and formula('rcdb').background == 255
    with pytest.raises(ValueError, match='steps has no published file names'):
        f.published_file(0, 0)


# Names that other people's code imports

PROMISED = {
    'core.rng': ['NumpyRandom', 'PythonRandom'],
    'formulas.formula': ['formula', 'formulas'],
    'formulas.contours': ['RCDB', 'VisualAtom'],
    'formulas.ifs': [
        'FractalDB',
        'OFDB2D',
        'OnePFrac',
        'render_ifs',
        'sample_system',
        'search_categories',
        'with_probabilities',
    ],
    'formulas.ifs3d': [
        'ExFractalDB',
        'MVFractalDB',
        'OFDB3D',
        'points_3d',
        'render_views',
        'search_categories_3d',
    ],
    'data.datasets': ['open_dataset'],
    'training.learner': ['fdsl_learner'],
    'models.checkpoints': ['load_weights', 'save_checkpoint'],
}


@pytest.mark.parametrize('module', PROMISED)
def test_promised_names_stay_where_they_are(module):
    found = importlib.import_module(f'fdsl_nb.{module}')
    assert [name for name in PROMISED[module] if name not in found.__all__] == []
