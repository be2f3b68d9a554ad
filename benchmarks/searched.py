"""The tables of searched categories that the package ships: python benchmarks/searched.py

Searches 21,000 classes of each search with default settings from the beginning, and writes how many
random numbers come before each accepted candidate to `fdsl_nb/formulas/searched/`: about eleven
minutes of one core for canonical FractalDB, seven for the clouds of the 3-D families, eighteen for
the published FractalDB. What is found is kept in FOLDER every 500 classes, so a search that was
stopped goes on; a published search may be given up at any multiple of that (`--classes`).
"""

import argparse
from pathlib import Path

import numpy as np

from fdsl_nb.core.rng import CATEGORY, CounterRandom, NumpyRandom
from fdsl_nb.formulas import ifs3d, ifs_search
from fdsl_nb.formulas.categories import TABLES, category_cache, save_skips

AT_ONCE = 500  # classes of a file
RATE, POINTS = 0.2, 100_000  # FractalDB
SPREAD = dict(variance=0.05, points=10_000, half_side=1.0)  # 3-D


def words_in_the_plane(c):
    "Words of class `c` before the first candidate that fills its picture."
    stream, begun = CounterRandom(0, CATEGORY, c), 0
    for maps, picks in ifs_search.canonical_candidates(stream, POINTS):
        if ifs_search.fill_share(maps, picks) >= RATE:
            return begun
        begun = stream.position


def words_in_space(c):
    "The same for the first cloud that is spread widely enough."
    stream = CounterRandom(0, CATEGORY, c)
    maps = ifs3d._search_system(stream, **SPREAD)
    return stream.position - 1 - 12 * len(maps) - SPREAD['points']


def stretches(search, folder, name, classes):
    "Words of each class whose stream is its own."
    for first in range(0, classes, AT_ONCE):
        path = folder / f'{name}-{first:05d}.npy'
        if not path.exists():
            np.save(path, [search(c) for c in range(first, min(first + AT_ONCE, classes))])
            print(path.name, flush=True)
        yield np.load(path)


def words_to_next(rng):
    "Words of the published stream before its next accepted candidate, which is drawn as well."
    rejected = 0
    candidates = ifs_search.published_candidates(rng, POINTS)
    while True:
        place = rng.get_state()[2]
        maps, picks = next(candidates)
        used = 12 * len(maps) + 2 * POINTS  # and one or more for the number of maps
        used += (rng.get_state()[2] - place - used) % 624
        if ifs_search.fill_share(maps, picks) >= RATE:
            return rejected
        rejected += used


def published_stretches(folder, classes):
    "The same for one stream, whose state is kept with what was found."
    rng = NumpyRandom(1)
    for first in range(0, classes, AT_ONCE):
        path = folder / f'p2-{first:05d}.npz'
        if not path.exists():
            skips = [words_to_next(rng) for _ in range(AT_ONCE)]
            kind, words, place, *_ = rng.get_state()
            np.savez(path, skips=skips, words=words, pos=place)
            print(path.name, flush=True)
        with np.load(path) as kept:
            rng.set_state(('MT19937', kept['words'], int(kept['pos'])))
            yield kept['skips']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--folder', default='runs/searched', help='for what was found so far')
    parser.add_argument('--classes', type=int, default=21_000)
    parser.add_argument('--only', help='one of fractaldb, fractals3d, fractaldb-published')
    given = parser.parse_args()
    folder, n = Path(given.folder), given.classes
    folder.mkdir(parents=True, exist_ok=True)
    searches = {
        category_cache('fractaldb', seed=0, rate=RATE, points=POINTS): stretches(
            words_in_the_plane, folder, 'c2', n
        ),
        category_cache('fractals3d', seed=0, **SPREAD): stretches(words_in_space, folder, 'c3', n),
        category_cache('fractaldb-published', rate=RATE, points=POINTS): published_stretches(
            folder, n
        ),
    }
    for cache, found in searches.items():
        if given.only in (None, cache.family):
            path = TABLES / f'{cache.family}.npz'
            save_skips(path, cache, np.concatenate(list(found))[:n])
            print(f'{path.name}: {n:,} classes, {path.stat().st_size / 1e3:.0f} kB', flush=True)


if __name__ == '__main__':
    main()
