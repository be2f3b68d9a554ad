"""What ThreadSanitizer finds where the threads of a block run a kernel on a CPU."""

import re
import subprocess
from pathlib import Path

import numpy as np

from fdsl_nb.formulas.cuda import SOURCES, Launch

BARRIER = '__syncthreads();'


def barriers(source):
    "Place of each barrier → the kernel it stands in."
    found = [m.start() for m in re.finditer(re.escape(BARRIER), source)]
    return {at: re.findall(r'__global__ void (\w+)\(', source[:at])[-1] for at in found}


def without_barrier(source, n):
    at = [*barriers(source)][n]
    return source[:at] + source[at:].replace(BARRIER, '', 1)


def write_launch(launch, path):
    images = np.prod(launch.shape) * np.dtype(launch.dtype).itemsize
    sizes = np.array([len(launch.pictures), images, launch.scratch], float)
    arrays = sizes, launch.pictures, launch.rows, launch.tables, launch.settings
    with path.open('wb') as f:
        for array in arrays:
            f.write(np.int64(array.nbytes).tobytes() + array.tobytes())


def races(
    source: str,  # of the kernels
    launch: Launch,
    folder: Path,  # for the program
) -> str:
    "What ThreadSanitizer reports of a block of four threads; '' for nothing."
    (folder / 'kernels.cu').write_text(source)
    words = ['g++', '-std=c++20', '-O1', '-g', '-pthread', '-rdynamic', '-fsanitize=thread']
    words += [f'-DKERNELS="{folder / "kernels.cu"}"', f'-I{SOURCES}']
    here = Path(__file__).with_name('cuda_program.cpp')
    subprocess.run([*words, here, '-ldl', '-o', folder / 'program'], check=True)
    write_launch(launch, folder / 'launch')
    words = [folder / 'program', f'{launch.kernel}_on_cpu', folder / 'launch', '4']
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode in (0, 66), done.stderr  # 66: something was found
    return done.stderr if done.returncode else ''
