"""How the notebooks are written, in numbers: python tests/style.py. Nothing fails here."""

import io
import statistics
import tokenize

from notebook_reading import (
    LIBRARY,
    ROOT,
    cells,
    code_cells,
    directives,
    exported_cells,
    is_exported,
    lines_of,
    prose_cells,
    words_of,
)

HEADS = ('notebook', 'cells', 'median', 'longest', '>100', '>108', 'words', 'told', 'shown')
LEGEND = '''
cells     exported cells
median    lines of an exported cell, half have fewer
longest   lines of the longest exported cell
>100      exported lines wider than 100 columns
>108      code cells with a line wider than 108 columns, which a page of the documentation cuts
words     words of prose for each exported line
told      exported cells followed by prose or a demonstration, %
shown     cells with a displayed result for each exported cell, %
'''
SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def told(path):
    "How many exported cells are followed by something to read: prose, a demonstration, or the end."
    visible = [c for c in cells(path) if 'hide' not in directives(c)]
    following = [*visible[1:], None]
    return sum(is_exported(c) and not (n and is_exported(n)) for c, n in zip(visible, following))


def row(path):
    "A line of the table: what HEADS names."
    exported = exported_cells(path)
    lengths = [len(lines_of(c)) for c in exported] or [0]
    lines = [line for c in exported for line in lines_of(c)]
    words = sum(words_of(c['source']) for c in prose_cells(path))
    shown = sum(bool(c['outputs']) for c in code_cells(path))
    wide = [c for c in code_cells(path) if any(len(line) > 108 for line in lines_of(c))]
    return (
        path.relative_to(ROOT / 'nbs').with_suffix('').as_posix(),
        len(exported),
        f'{statistics.median(lengths):g}',
        max(lengths),
        sum(len(line) > 100 for line in lines),
        len(wide),
        f'{words / max(1, len(lines)):.1f}',
        percent(told(path), len(exported)),
        percent(shown, len(exported)),
    )


def percent(part, whole):
    return f'{100 * part / max(1, whole):.0f}'


def tokens_a_line(path):
    "The number of tokens of each line of a module, docstrings as one and comments as none."
    count = {}
    with open(path, 'rb') as file:
        for token in tokenize.tokenize(io.BytesIO(file.read()).readline):
            if token.type not in SKIPPED:
                count[token.start[0]] = count.get(token.start[0], 0) + 1
    return list(count.values())


def totals():
    "Sentences about all modules."
    paths = [p for p in sorted((ROOT / 'fdsl_nb').rglob('*.py')) if p.name != '_modidx.py']
    texts = [p.read_text('utf-8') for p in paths]
    tokens = sorted(n for p in paths for n in tokens_a_line(p))
    deciles = statistics.quantiles(tokens, n=10)
    yield f'{len(paths)} modules, {sum(text.count(chr(10)) for text in texts):,} lines'
    yield f'tokens a line: half have up to {deciles[4]:g}, nine of ten up to {deciles[8]:g}'
    yield f'methods added by @patch: {sum(text.count("@patch") for text in texts)}'


def main():
    rows = [HEADS, *map(row, LIBRARY)]
    width = max(len(name) for name, *_ in rows)
    for name, *values in rows:
        print(name.ljust(width), *(f'{v:>8}' for v in values))
    print(LEGEND)
    for line in totals():
        print(line)


if __name__ == '__main__':
    main()
