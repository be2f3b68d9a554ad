import hashlib
import pathlib
import warnings

import numba

__version__ = "0.1.0"

# timm still scripts a few layers when it is imported, and torch 2.15 warns of that in every process
warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated', FutureWarning)

# numba compiles a kernel anew when its own file changes, not when a kernel that it calls does: every state of the package gets a cache of its own
_here = pathlib.Path(__file__).parent
_state = hashlib.sha256(b''.join(p.read_bytes() for p in sorted(_here.rglob('*.py')))).hexdigest()[:12]
numba.config.CACHE_DIR = numba.config.CACHE_DIR or str(_here/'__pycache__'/f'kernels-{_state}')
