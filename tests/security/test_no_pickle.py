"""The sources: nothing that unpickles, evaluates text or starts a shell, and no import that is not declared."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [file for folder in ("src", "scripts", "reproductions") for file in sorted((ROOT / folder).rglob("*.py"))]

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "dbm", "jsonpickle"}
ALLOWED = {("src/foveal/backbones/weights.py", "pickle"): "the error that torch raises on pickles, and nothing else"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {"os.system", "os.popen", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"}
ATTRIBUTES |= {"pandas.read_pickle", "pd.read_pickle", "yaml.unsafe_load", "yaml.full_load", "tempfile.mktemp"}
UNPACKING = {"extract", "extractall", "unpack_archive"}


def name_of(node: ast.AST) -> str:
    """`a.b.c` of such an expression, else ''."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword, or None."""
    return next((k.value.value for k in call.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


def faults(tree: ast.AST, file: str) -> Iterator[str]:
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            top = module.partition(".")[0]
            if top in MODULES and (file, top) not in ALLOWED:
                yield f"imports {module}"
        if not isinstance(node, ast.Call):
            continue
        called = name_of(node.func)
        last = called.rpartition(".")[2] or (node.func.attr if isinstance(node.func, ast.Attribute) else "")
        if called in CALLS:
            yield f"calls {called}"
        if called in ATTRIBUTES:
            yield f"calls {called}"
        if called.startswith("pickle."):
            yield f"calls {called}"
        if called == "torch.load" and keyword(node, "weights_only") is not True:
            yield "torch.load without weights_only=True"
        if last == "load" and called.startswith(("np.", "numpy.")) and keyword(node, "allow_pickle") is True:
            yield "np.load with allow_pickle"
        if called == "yaml.load":
            yield "yaml.load"
        if keyword(node, "shell") is True:
            yield "a shell"
        if keyword(node, "trust_remote_code") or keyword(node, "trust_repo"):
            yield "code from the Hub"
        if last in UNPACKING and "tar" in called.lower() + file:
            yield f"{called} of an archive"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import os\nos.system('x')",
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "np.load(p, allow_pickle=True)",
        "yaml.load(t)",
        "subprocess.run('x', shell=True)",
        "eval(x)",
        "tar.extractall()",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
    ],
)
def test_the_search_finds(code: str):
    assert list(faults(ast.parse(code), "somewhere.py"))


def test_no_pickle_no_eval_no_shell():
    assert len(FILES) > 80
    found = [
        f"{file.relative_to(ROOT)}: {fault}"
        for file in FILES
        for fault in faults(ast.parse(file.read_text(encoding="utf-8")), file.relative_to(ROOT).as_posix())
    ]
    assert found == []


def test_pickle_is_imported_for_its_error_alone():
    for (file, module), _ in ALLOWED.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        used = {name_of(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert {name for name in used if name.startswith(f"{module}.")} == {"pickle.UnpicklingError"}
