"""A notebook-first reproducibility kit for formula-driven supervised learning

Modules:

- `fdsl_nb.data.cuda_augment`: Grey images augmented, and batches made, by CUDA kernels.
- `fdsl_nb.data.fast_augment`: timm's training transform for grey images, compiled, to the bit."""

import hashlib
import importlib
import os
import pathlib
import sys
import warnings

__version__ = "0.1.0"

# timm still scripts a few layers when it is imported, and torch 2.15 warns of that in every process
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)


def _keep_kernels_apart():
    """Gives every state of the package its own cache of compiled kernels.

    numba compiles a kernel anew when its own file changes, not when a kernel that it calls does.
    """
    here = pathlib.Path(__file__).parent
    given = os.environ.get('NUMBA_CACHE_DIR', '')
    # a process that was started before a file changed hands its own folder on
    if given and pathlib.Path(given).parent != here / '__pycache__':
        return
    sources = b''.join(p.read_bytes() for p in sorted(here.rglob('*.py')))
    state = hashlib.sha256(sources).hexdigest()[:12]
    os.environ['NUMBA_CACHE_DIR'] = str(here / '__pycache__' / f'kernels-{state}')
    # numba reads the variable when it is imported
    if 'numba' in sys.modules:
        sys.modules['numba'].config.reload_config()


_keep_kernels_apart()

# The functions `build` and `formulas` are not among them:
# the packages fdsl_nb.build and fdsl_nb.formulas have their names.
_PLACES = {
    'formulas.formula': ('Formula', 'formula'),
    'formulas.contours': ('RCDB', 'VisualAtom'),
    'formulas.ifs': ('FractalDB', 'OFDB2D', 'OnePFrac'),
    'formulas.ifs3d': ('ExFractalDB', 'MVFractalDB', 'OFDB3D'),
    'models.models': ('create_model',),
    'models.checkpoints': ('load_weights',),
    'models.serialization': ('save_checkpoint',),
    'data.datasets': ('open_dataset',),
    'training.recipes': ('recipe', 'recipes'),
    'training.learner': ('fdsl_learner',),
    'training.training': ('train',),
    'training.interactive': ('fdsl_dls',),
    'app.explore': ('explore',),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    found = getattr(importlib.import_module(f'.{_MODULES[name]}', __name__), name)
    globals()[name] = found
    return found


def __dir__():
    return sorted({*globals(), *_MODULES})
