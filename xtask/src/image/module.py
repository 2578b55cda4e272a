"""Checks the Terraform module against the schema of the AWS provider, without the provider.

The schema is that of the provider's bindings for Python, whose wheel is read and not run: one class for each
resource and for each block in it, whose arguments are the schema's.

usage: module.py FOLDER WHEEL
"""

import ast
import pathlib
import re
import sys
import zipfile

import hcl2

# Arguments that every resource has, whatever its schema.
META = {"count", "depends_on", "for_each", "lifecycle", "provider"}
# What the parser adds.
OWN = {"__is_block__", "__comments__", "__inline_comments__"}


class Schema:
    """The classes of the bindings, read when they are asked for."""

    def __init__(self, wheel):
        self.wheel = zipfile.ZipFile(wheel)
        self.modules = {}

    def classes(self, folder):
        if folder not in self.modules:
            path = f"cdktn_provider_aws/{folder}/__init__.py"
            try:
                source = self.wheel.read(path)
            except KeyError:
                return None
            tree = ast.parse(source)
            self.modules[folder] = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        return self.modules[folder]


def arguments(cls):
    """Name, annotation and whether it is needed of each argument of a class."""
    init = next(f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults)
    return {a.arg: (ast.unparse(a.annotation), default is None) for a, default in pairs}


def attributes(cls):
    """What others may read of a resource."""
    return {f.name for f in cls.body if isinstance(f, ast.FunctionDef)}


def blocks(body):
    """Name and body of each block within a body, dynamic ones too."""
    for name, value in body.items():
        for item in value if isinstance(value, list) else []:
            if not isinstance(item, dict) or "__is_block__" not in item and name != "dynamic":
                continue
            if name == "dynamic":
                for label, dynamic in item.items():
                    if label not in OWN:
                        yield from ((label.strip('"'), content) for content in dynamic["content"])
            else:
                yield name, item


def check(place, body, cls, classes, problems):
    known = arguments(cls)
    inner = list(blocks(body))
    given = (set(body) | {name for name, _ in inner}) - OWN - META - {"dynamic"}
    for name in sorted(given - set(known)):
        problems.append(f"{place}: the provider knows no `{name}`")
    for name, (_, needed) in known.items():
        if needed and name not in given:
            problems.append(f"{place}: `{name}` is missing")
    for name, content in inner:
        if name in META or name not in known:
            continue
        nested = [c for c in re.findall(r"'(\w+)'", known[name][0]) if c in classes]
        if not nested:
            problems.append(f"{place}: `{name}` is no block")
        else:
            check(f"{place}.{name}", content, classes[nested[0]], classes, problems)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in OWN:
                yield key
                yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def items(whole, kind):
    """Labels and body of the blocks of a kind."""
    for block in whole.get(kind, []):
        for label, body in block.items():
            if label not in OWN:
                yield label.strip('"'), body


def main(folder, wheel):
    schema = Schema(wheel)
    problems = []

    def load(of):
        whole = {}
        for file in sorted(of.glob("*.tf")):
            for kind, value in hcl2.loads(file.read_text()).items():
                if kind not in OWN:
                    whole.setdefault(kind, []).extend(value)
        return whole

    whole = load(folder)
    things = {}
    for kind, prefix in (("resource", ""), ("data", "data_")):
        for of, named in items(whole, kind):
            path = prefix + (of if prefix else of.removeprefix("aws_"))
            classes = schema.classes(path)
            name = "".join(part.title() for part in path.split("_"))
            for own, body in named.items():
                if own in OWN:
                    continue
                own = own.strip('"')
                place = f"{of}.{own}"
                cls = (classes or {}).get(name)
                if cls is None:
                    problems.append(f"{place}: the provider knows no such {kind}")
                    continue
                things[("data." if prefix else "") + place] = cls
                check(place, body, cls, classes, problems)

    variables = {name for name, _ in items(whole, "variable")}
    names = {name for block in whole["locals"] for name in block if name not in OWN}
    used = set()
    for text in strings({kind: whole[kind] for kind in whole if kind != "terraform"}):
        for name in re.findall(r"(?<![\w.])var\.(\w+)", text):
            used.add(name)
            if name not in variables:
                problems.append(f"there is no variable `{name}`")
        for name in re.findall(r"(?<![\w.])local\.(\w+)", text):
            if name not in names:
                problems.append(f"there is no local value `{name}`")
        for name, attribute in re.findall(r"(?<![\w.])((?:data\.)?aws_\w+\.\w+)(?:\.(\w+))?", text):
            if name not in things:
                problems.append(f"there is no `{name}`")
            elif attribute and attribute not in attributes(things[name]):
                problems.append(f"`{name}` has no `{attribute}`")
    problems += [f"the variable `{name}` is not used" for name in sorted(variables - used)]

    for name, body in items(whole, "module"):
        inner = load(folder / body["source"].strip('"'))
        takes = dict(items(inner, "variable"))
        given = set(body) - OWN - META - {"source"}
        problems += [f"module {name}: it takes no `{a}`" for a in sorted(given - set(takes))]
        needed = {a for a, variable in takes.items() if "default" not in variable}
        problems += [f"module {name}: `{a}` is missing" for a in sorted(needed - given)]

    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    if problems:
        return 1
    version = re.search(r"provider version ([\d.]+)", schema.wheel.read(metadata(schema.wheel)).decode())
    print(f"{len(things)} resources and data sources fit the AWS provider {version[1]}")
    return 0


def metadata(wheel):
    return next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2]))
