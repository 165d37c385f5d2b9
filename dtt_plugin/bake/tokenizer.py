"""The tokenizer of a defended checkpoint: k more special tokens, and everything else as it was.

tokenizer.json is edited as JSON rather than loaded and saved, so that nothing
of it is rewritten in another version's spelling.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtt_plugin.checkpoint_folder import read_json_table
from dtt_plugin.control_tokens import DEFENSIVE_TOKEN_PREFIX
from dtt_plugin.errors import DttError

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
DEFAULT_TEMPLATE = "default"
_RESERVED = re.compile(r"reserved|unused|extra_\d+|placeholder", re.IGNORECASE)
_CONFIG_SIDE_FILES = ("special_tokens_map.json", "added_tokens.json")


class TokenizerFiles:
    """The tokenizer files of one checkpoint, read.

    Raises:
        DttError: there is no tokenizer.json, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise DttError(
                f"{folder} has no tokenizer.json; make one with "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`."
            )
        self.folder = folder
        self.tokenizer = read_json_table(folder / "tokenizer.json")
        self.config = read_json_table(folder / "tokenizer_config.json", missing={})
        self._added: list[dict[str, Any]] = self.tokenizer.get("added_tokens") or []
        try:
            vocabulary = self.tokenizer["model"]["vocab"]
            # Unigram has a list of [token, score], where the id is the position.
            ids = list(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
            self._model_size = len(ids)
            added = {str(entry["content"]): entry["id"] for entry in self._added}
            self.size: int = max([*ids, *added.values()]) + 1
            """One more than the highest id, as `len(tokenizer)` has it where there are no gaps."""
        except (KeyError, TypeError, ValueError) as error:
            path = folder / "tokenizer.json"
            raise DttError(f"{path} has no readable vocabulary or added_tokens; download it again.") from error

    @property
    def added_tokens(self) -> list[str]:
        """Every added token: what must be broken in untrusted text."""
        named = [self.config.get(key) for key in self.config if key.endswith("_token")]
        contents = [entry.get("content") if isinstance(entry, dict) else entry for entry in named]
        return sorted(
            {str(entry["content"]) for entry in self._added}
            | {content for content in contents if isinstance(content, str) and content}
        )

    @property
    def defended(self) -> bool:
        """Whether it knows DefensiveTokens already."""
        return any(str(entry["content"]).startswith(DEFENSIVE_TOKEN_PREFIX) for entry in self._added)

    @property
    def bos(self) -> str:
        """The BOS text, empty where there is none."""
        bos = self.config.get("bos_token")
        if isinstance(bos, dict):
            bos = bos.get("content")
        return bos if isinstance(bos, str) else ""

    def next_ids(self, k: int) -> list[int]:
        """Return the ids that k added tokens get."""
        # tokenizers numbers an added token after the model's vocabulary or the highest added id.
        start = max([self._model_size, *(entry["id"] + 1 for entry in self._added)])
        if start < self.size:
            raise DttError(
                f"{self.folder / 'tokenizer.json'} has gaps in its ids, so new tokens would take used ones; "
                "such a tokenizer is not supported."
            )
        return list(range(start, start + k))

    def reserved_ids(self, k: int) -> list[int]:
        """Return the k highest ids of unused reserved tokens, ascending.

        Raises:
            DttError: there are fewer.
        """
        templates = "".join(self.templates().values()) + json.dumps(self.config.get("bos_token", ""))
        named = set(self._named_special_tokens())
        free = [
            int(entry["id"])
            for entry in self._added
            if _RESERVED.search(entry["content"])
            and entry["content"] not in templates
            and entry["content"] not in named
        ]
        if len(free) < k:
            raise DttError(
                f"--reuse-reserved: the tokenizer in {self.folder} has {len(free)} unused reserved tokens and "
                f"{k} are needed; leave the option out, and the vocabulary grows."
            )
        return sorted(free)[-k:]

    def _named_special_tokens(self) -> Iterator[str]:
        for key, value in self.config.items():
            if key.endswith("_token"):
                yield str(value.get("content") if isinstance(value, dict) else value)

    def templates(self) -> dict[str, str]:
        """Return the model's chat templates by name; the usual one is called "default"."""
        found: dict[str, str] = {}
        stored = self.config.get("chat_template")
        if isinstance(stored, str):
            found[DEFAULT_TEMPLATE] = stored
        elif isinstance(stored, list):
            try:
                found |= {str(entry["name"]): str(entry["template"]) for entry in stored}
            except (KeyError, TypeError) as error:
                path = self.folder / "tokenizer_config.json"
                raise DttError(f"{path} lists a chat_template without name or template; download it again.") from error
        # Where both exist, transformers takes the files.
        file = self.folder / TEMPLATE_FILE
        if file.is_file():
            found[DEFAULT_TEMPLATE] = _read_template(file)
        for more in sorted((self.folder / MORE_TEMPLATES).glob("*.jinja")):
            found[more.stem] = _read_template(more)
        return found

    def adds_bos(self) -> bool:
        """Return whether the tokenizer puts a BOS in front of plain text by itself."""
        from tokenizers import Tokenizer

        if not self.bos:
            return False
        tokenizer = Tokenizer.from_str(json.dumps(self.tokenizer, ensure_ascii=False))
        ids: list[int] = tokenizer.encode("a").ids
        return ids[:1] == [tokenizer.token_to_id(self.bos)]

    def write_defended(
        self,
        folder: Path,
        names: tuple[str, ...],
        token_ids: tuple[int, ...],
        templates: dict[str, str],
        *,
        keep_bos: bool,
    ) -> list[str]:
        """Write the tokenizer files with the DefensiveTokens `names` at `token_ids` into `folder`.

        Args:
            folder: where to.
            names: of the tokens.
            token_ids: their ids: new ones, or those of reserved tokens, which are renamed.
            templates: the defended chat templates by name.
            keep_bos: leave the tokenizer adding a BOS by itself. Without it, the template alone renders the
                BOS, since BOS + DefensiveTokens + BOS is not what the tokens were trained with.

        Returns:
            The names of the files written, relative to `folder`.
        """
        entries = [_entry(name, token_id) for name, token_id in zip(names, token_ids, strict=True)]
        tokenizer = copy.deepcopy(self.tokenizer)
        replaced = {entry["id"]: entry["content"] for entry in self._added if entry["id"] in token_ids}
        tokenizer["added_tokens"] = sorted(
            [entry for entry in tokenizer["added_tokens"] if entry["id"] not in token_ids] + entries,
            key=lambda entry: entry["id"],
        )
        _rename_in_model(tokenizer["model"], replaced, dict(zip(token_ids, names, strict=True)))
        if not keep_bos and self.bos:
            tokenizer["post_processor"] = _without_bos(tokenizer.get("post_processor"), self.bos)
        written = {"tokenizer.json": tokenizer}
        written["tokenizer_config.json"] = self._defended_config(entries, replaced, templates, keep_bos)
        for name in _CONFIG_SIDE_FILES:
            if (self.folder / name).is_file():
                table = read_json_table(self.folder / name)
                written[name] = _defended_side_file(name, table, entries, replaced)
        for name, table in written.items():
            # tokenizer.json is large, and other tools compare it: the library's own spelling, two spaces.
            text = json.dumps(table, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")
        return [*written, *_write_templates(folder, templates)]

    def _defended_config(
        self,
        entries: list[dict[str, Any]],
        replaced: dict[int, str],
        templates: dict[str, str],
        keep_bos: bool,
    ) -> dict[str, Any]:
        config = copy.deepcopy(self.config)
        decoder = config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            for entry in entries:
                decoder[str(entry["id"])] = {key: value for key, value in entry.items() if key != "id"}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(config.get(key), list):
                config[key] = _special_list(config[key], entries, replaced)
        if not keep_bos and "add_bos_token" in config:
            config["add_bos_token"] = False
        stored = config.get("chat_template")
        if isinstance(stored, str):
            config["chat_template"] = templates[DEFAULT_TEMPLATE]
        elif isinstance(stored, list):
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        return config


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DttError(f"{path} can't be read as UTF-8 text; download it again.") from error


def _entry(name: str, token_id: int) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": name,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _rename_in_model(model: dict[str, Any], replaced: dict[int, str], names: dict[int, str]) -> None:
    """Rename reserved tokens that the model's own vocabulary lists too."""
    vocabulary = model.get("vocab")
    for token_id, old in replaced.items():
        if isinstance(vocabulary, dict) and vocabulary.get(old) == token_id:
            del vocabulary[old]
            vocabulary[names[token_id]] = token_id
        elif isinstance(vocabulary, list) and token_id < len(vocabulary):
            vocabulary[token_id][0] = names[token_id]


def _special_list(tokens: list[Any], entries: list[dict[str, Any]], replaced: dict[int, str]) -> list[Any]:
    gone = set(replaced.values())
    kept = [token for token in tokens if (token.get("content") if isinstance(token, dict) else token) not in gone]
    return kept + [entry["content"] for entry in entries]


def _defended_side_file(
    name: str, table: dict[str, Any], entries: list[dict[str, Any]], replaced: dict[int, str]
) -> dict[str, Any]:
    if name == "added_tokens.json":
        kept = {token: token_id for token, token_id in table.items() if token_id not in replaced}
        return kept | {entry["content"]: entry["id"] for entry in entries}
    tokens = table.get("additional_special_tokens", [])
    return {**table, "additional_special_tokens": _special_list(tokens, entries, replaced)}


def _without_bos(processor: Any, bos: str) -> Any:
    """Return a post-processor that puts no BOS in front."""
    if not isinstance(processor, dict):
        return processor
    if processor.get("type") == "Sequence":
        parts = [_without_bos(part, bos) for part in processor["processors"]]
        return {**processor, "processors": parts}
    if processor.get("type") == "TemplateProcessing":
        trimmed = dict(processor)
        for key in ("single", "pair"):
            trimmed[key] = [piece for piece in processor[key] if piece.get("SpecialToken", {}).get("id") != bos]
        return trimmed
    return processor


def _write_templates(folder: Path, templates: dict[str, str]) -> list[str]:
    files = []
    for name, text in templates.items():
        file = TEMPLATE_FILE if name == DEFAULT_TEMPLATE else f"{MORE_TEMPLATES}/{name}.jinja"
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
        files.append(file)
    return files
