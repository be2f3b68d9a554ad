"""A Sphinx extension for how we write.

Comments of parameters go to the reference, Markdown in docstrings is read, and names in code lead
to the reference.
"""

import dataclasses
import inspect
import json
import re
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments

import fdsl_nb


# Docstrings


def as_rst(text):
    "A line of a docstring or a comment, Markdown as we write it, as reStructuredText."
    parts = text.split('`')

    def escaped(p):
        return re.sub(r'([\\*_|`])', r'\\\1', p)

    if len(parts) % 2 == 0:  # a backtick without its partner
        return escaped(text)
    parts[::2] = map(escaped, parts[::2])
    # a role needs a space or a sign around it; an escaped space is none on the page
    parts[1::2] = [
        rf'\ :py:obj:`{p}`\ ' if re.fullmatch(r'[A-Za-z_][\w.]*(\(\))?', p) else rf'\ ``{p}``\ '
        for p in parts[1::2]
    ]
    return ''.join(parts)


def number(value):
    "A number to read: 2³² − 1 rather than its ten digits."
    power = isinstance(value, int) and value > 2**30 and (value + 1).bit_length() - 1
    if power and value + 1 == 2**power:
        return f'2{str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))} − 1'
    return f'{value:,}' if isinstance(value, int) else str(value)


def range_of(knob):
    "What a knob may be, in words; '' where nothing says."
    if knob.get('choices'):
        return ', '.join(f'`{c!r}`' for c in knob['choices'])
    low, high = knob.get('low'), knob.get('high')
    return '' if low is None or high is None else f'{number(low)} … {number(high)}'


def comments_of(thing):
    "Parameter → what its comment or its knob says; `return` for what comes back."
    found = {k: ' '.join(v.split()) for k, v in docments(thing, returns=True).items() if v}
    if dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            parts = (field.metadata.get('help', ''), range_of(field.metadata))
            if any(parts):
                found[field.name] = '; '.join(filter(None, parts))
    return {k: v for k, v in found.items() if k not in ('self', 'cls')}


def write_parameters(app, what, name, thing, options, lines):
    "autodoc's docstring, from Markdown, and below it a field for each commented parameter."
    if what == 'data':
        lines[:] = []  # a constant has no docstring but its type's
    lines[:] = map(as_rst, lines)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        try:
            comments = comments_of(thing)
        except (TypeError, OSError, AttributeError):  # no source: made by C or by another class
            return
        returned = comments.pop('return', None)
        fields = [f':param {k}: {as_rst(v)}' for k, v in comments.items()]
        if returned and not inspect.isclass(thing):
            fields.append(f':returns: {as_rst(returned)}')
        lines += ['', *fields, '']


# Names in code

NAME = re.compile(
    r'(<span class="o">\.</span>)?'
    r'<span class="(n|nf|nc|nn)">([\w.]+)</span>'
    r'(<span class="o">=</span>)?'
)


BEGINS = r'<div class="highlight-python[^>]*><div class="highlight"><pre>'
CODE = re.compile(BEGINS + '.*?</pre>', re.DOTALL)
IMPORT = re.compile(r'^ *from (fdsl_nb[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))', re.MULTILINE)


def imports_of(code):
    "Name → full name, for all that code imports from the package."
    found = {}
    for module, *names in IMPORT.findall(code):
        names = [re.sub(r'#.*', '', n).strip() for n in re.split(r',|\n', ''.join(names))]
        found |= {n: f'{home_of(module, n)}.{n}' for n in names if n.isidentifier()}
    return found


def home_of(module, name):
    "The module whose page explains a name that is imported from `module`."
    thing = getattr(fdsl_nb, name, None) if module == 'fdsl_nb' else None
    return getattr(thing, '__module__', module)


def imported(doctree):
    "Name → full name, for all that the code of a page imports from the package."
    found = {}
    for block in doctree.findall(nodes.literal_block):
        found |= imports_of(block.astext())
    return found


def link_names(app, page, template, context, doctree):
    "Names of ours in a page's code lead to the reference; attributes and keywords are not ours."
    if doctree is None or page.startswith('api/'):
        return
    of_chapters = json.loads((Path(app.srcdir) / 'names.json').read_text('utf-8'))
    here = imported(doctree) | of_chapters.get(page, {})
    known = app.env.domains.python_domain.objects

    def link(m):
        full = m[3] if m[2] == 'nn' else here.get(m[3])
        if m[1] or m[4] or full not in known:
            return m[0]
        target = f'{app.builder.get_relative_uri(page, known[full].docname)}#{known[full].node_id}'
        return f'<a class="to-reference" href="{target}" title="{full}">{m[0]}</a>'

    context['body'] = CODE.sub(lambda m: NAME.sub(link, m[0]), context['body'])


def setup(app):
    app.connect('autodoc-process-docstring', write_parameters)
    app.connect('html-page-context', link_names)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
