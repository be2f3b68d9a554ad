"""Which module imports which, read from the source and without importing anything."""

import ast
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Arrow:
    "One import: `source` imports `target`, both as dotted names."

    source: str
    target: str
    line: int
    kind: str  # 'import'; 'string' for import_module('…'); 'command' for python -m …

    def __str__(self):
        how = {'import': 'imports', 'string': 'imports by string', 'command': 'starts'}[self.kind]
        return f'{self.source}, line {self.line}, {how} {self.target}'


def dotted(path):
    "fdsl_nb/core/rng.py → fdsl_nb.core.rng; a package's __init__.py has the package's name."
    parts = PurePosixPath(path).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def arrows(
    sources,  # path → text of every module of a package, such as fdsl_nb/core/rng.py
    package='fdsl_nb',
):  # only imports of its modules are of interest
    "All imports among `sources`, also inside functions; other names count as their module."
    known = {dotted(path) for path in sources}
    found = []
    for path, text in sources.items():
        name = dotted(path)
        home = name if path.endswith('__init__.py') else name.rpartition('.')[0]
        for node in ast.walk(ast.parse(text, path)):
            for kind, target in named_by(node, home, package):
                found.append(Arrow(name, module_in(target, known), node.lineno, kind))
    return found


def module_in(target, known):
    "The longest beginning of a dotted name that is a module; the name itself where none is."
    parts = target.split('.')
    beginnings = ['.'.join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((b for b in beginnings if b in known), target)


def named_by(node, home, package):
    "What a node of a syntax tree imports from `package`: (kind, dotted name) of each."

    def ours(name):
        return name == package or name.startswith(package + '.')

    if isinstance(node, ast.Import):
        yield from (('import', a.name) for a in node.names if ours(a.name))
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ''
        if node.level:
            above = home.split('.')[: len(home.split('.')) - node.level + 1]
            base = '.'.join([*above, *filter(None, [node.module])])
        if ours(base):
            yield from (('import', f'{base}.{a.name}') for a in node.names)
    elif (
        isinstance(node, ast.Call) and called(node) in ('import_module', '__import__') and node.args
    ):
        begun = beginning(node.args[0])
        if begun.startswith('.'):
            yield 'string', f'{home}.{begun.strip(".")}'.strip('.')
        elif ours(begun.split(':')[0].rstrip('.')):
            yield 'string', begun.split(':')[0].rstrip('.')
    elif isinstance(node, (ast.List, ast.Tuple, ast.Call)):
        words = node.args if isinstance(node, ast.Call) else node.elts
        for flag, word in pairwise(words):
            if beginning(flag) == '-m' and ours(beginning(word)):
                yield 'command', beginning(word)


def called(node):
    "The last name of what a call calls."
    return getattr(node.func, 'attr', getattr(node.func, 'id', ''))


def beginning(node):
    "The text of a string, or of an f-string up to its first value; '' for anything else."
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ''


def upward(found, order, package='fdsl_nb'):
    "The arrows that lead to a higher package; what stands in no package of `order` is above all."

    def level(name):
        parts = name.split('.')
        return order.index(parts[1]) if len(parts) > 1 and parts[1] in order else len(order)

    return [a for a in found if a.kind != 'command' and level(a.target) > level(a.source)]


def circles(found):
    "Every circle of imports once, as the list of its modules; a command closes none."
    graph = {}
    for a in found:
        if a.kind != 'command' and a.source != a.target:
            graph.setdefault(a.source, set()).add(a.target)
    done, rings = set(), []

    def visit(name, trail):
        if name in trail:
            ring = trail[trail.index(name) :]
            if not any(set(ring) == set(r) for r in rings):
                rings.append(ring)
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return rings
