"""The tokenizer of a defended checkpoint: k more special tokens, and everything else as it was.

tokenizer.json is edited as JSON rather than loaded and saved, so that nothing
of it is rewritten in another version's spelling.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtt_plugin.bake.engine_tokenizer import load_as_engine
from dtt_plugin.checkpoint.families import text_configs
from dtt_plugin.checkpoint.folder import check_within, read_json_table
from dtt_plugin.errors import DttError
from dtt_plugin.files.reading import read_bytes
from dtt_plugin.prompt.control_tokens import DEFENSIVE_TOKEN_PREFIX
from dtt_plugin.prompt.formats import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

logger = logging.getLogger("dtt_plugin")

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
_RESERVED = re.compile(r"reserved|unused|extra_\d+|placeholder", re.IGNORECASE)
_CONFIG, _SPECIAL_MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
# A chat template is a file of its name: no separators, no leading or trailing dot, nothing that a system reserves.
_TEMPLATE_NAME = re.compile(r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))\w([\w .+-]{0,98}[\w+-])?", re.IGNORECASE)
# Classes that add no token of their own.
_PLAIN_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class TokenizerFiles:
    """The tokenizer files of one checkpoint, read.

    Raises:
        DttError: there is no tokenizer.json, one of the files is damaged, or a chat template has a name that is no
            plain file name.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            raise DttError(_no_tokenizer(folder))
        self.folder = folder
        self.tokenizer = read_json_table(folder / "tokenizer.json")
        self.config = read_json_table(folder / _CONFIG, missing={})
        self.special_map = read_json_table(folder / _SPECIAL_MAP, missing={})
        self._declared = {str(text): token_id for text, token_id in self._with_ids()}
        self._added: list[dict[str, Any]] = self.tokenizer.get("added_tokens") or []
        try:
            vocabulary = self.tokenizer["model"]["vocab"]
            # Unigram has a list of [token, score], where the id is the position.
            ids = list(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))
            added = {entry["content"]: entry["id"] for entry in self._added}
            if not all(type(i) is int and i >= 0 for i in (*ids, *added.values())) or not (ids or added):
                raise ValueError("an id that is no number")
            if not all(isinstance(text, str) for text in added) or len(added) < len(self._added):
                raise ValueError("a token that is no text, or comes twice")
        except (KeyError, TypeError, ValueError) as error:
            path = folder / "tokenizer.json"
            raise DttError(f"{path} has no readable vocabulary or added_tokens; download it again.") from error
        self._templates = self._read_templates()
        self._others = self._named()
        self._model_size, self._largest_id = len(ids), max([*ids, *added.values()])

    @cached_property
    def backend(self) -> Tokenizer:
        """tokenizer.json as the library `tokenizers` loads it.

        Raises:
            DttError: it refuses the file, or gives a token another id than the file does.
        """
        path = self.folder / "tokenizer.json"
        backend = read_backend(path)
        if any(backend.token_to_id(entry["content"]) != entry["id"] for entry in self._added):
            raise DttError(
                f"{path} has gaps in its ids, so new tokens would take used ones; such a tokenizer is not supported."
            )
        return backend

    @cached_property
    def as_engine(self) -> Any | None:
        """The tokenizer as transformers loads it, where that is installed."""
        return load_as_engine(self.folder)

    @cached_property
    def known(self) -> dict[int, AddedToken]:
        """The added tokens by id, as an engine has them: also those that only other files or its class name.

        Raises:
            DttError: the files contradict each other about an id, or only transformers, which is not
                installed, could tell it.
        """
        backend = self.backend
        engine = self.as_engine
        known = self._known_from_files(backend) if engine is None else dict(engine.added_tokens_decoder)
        id_of = {token.content: token_id for token_id, token in known.items()}
        for text, token_id in self._declared.items():
            actual = id_of.get(text, backend.token_to_id(text))
            if text and actual != token_id:
                raise DttError(
                    f"The tokenizer files in {self.folder} disagree about {text!r}: its id is {token_id} in one of "
                    f"them and {actual} for the engines; correct them."
                )
        return known

    def _known_from_files(self, backend: Tokenizer) -> dict[int, AddedToken]:
        from tokenizers import AddedToken

        known: dict[int, AddedToken] = dict(backend.get_added_tokens_decoder())
        for text in self._others:
            token_id = backend.token_to_id(text)
            if token_id is None:
                raise DttError(
                    f"The tokenizer in {self.folder} has no id for {text!r}, which another of its files names: its "
                    "class gives it one, so transformers is needed to bake (pip install 'dtt-plugin[hf]')."
                )
            known.setdefault(token_id, AddedToken(text, special=True, normalized=False))
        if self.config.get("tokenizer_class", "") not in (*_PLAIN_CLASSES, "", None):
            logger.warning(
                "transformers is not installed, so tokens that %s adds by itself are not known; with "
                "'dtt-plugin[hf]' they are.",
                self.config["tokenizer_class"],
            )
        return known

    def _named(self) -> list[str]:
        """Return the tokens that files beside tokenizer.json name, each once."""
        texts = dict.fromkeys(self._declared)
        for name, table in ((_CONFIG, self.config), (_SPECIAL_MAP, self.special_map)):
            texts |= dict.fromkeys(text for key, text in _named_tokens(table) if key not in _SPECIAL_LISTS)
            for key in _SPECIAL_LISTS:
                texts |= dict.fromkeys(_listed(table.get(key), self.folder / name))
        return [text for text in texts if text]

    def _with_ids(self) -> Iterator[tuple[str, int]]:
        """Yield (token, id) as tokenizer_config.json's added_tokens_decoder and added_tokens.json have them."""
        decoder = self.config.get("added_tokens_decoder")
        added = read_json_table(self.folder / _ADDED, missing={})
        try:
            yield from ((entry["content"], int(number)) for number, entry in (decoder or {}).items())
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            path = self.folder / _CONFIG
            raise DttError(f"{path} has no readable added_tokens_decoder; download it again.") from error
        if not all(type(token_id) is int for token_id in added.values()):
            raise DttError(f"{self.folder / _ADDED} should give each token a number; download it again.")
        yield from added.items()

    @property
    def size(self) -> int:
        """One more than the highest id, as `len(tokenizer)` has it where there are no gaps."""
        return int(max([self._largest_id, *self.known])) + 1

    @property
    def added_tokens(self) -> list[str]:
        """Every added token: what must be broken in untrusted text."""
        return sorted({*(token.content for token in self.known.values()), *self._others})

    @property
    def defended(self) -> bool:
        """Whether it knows DefensiveTokens already."""
        return any(entry["content"].startswith(DEFENSIVE_TOKEN_PREFIX) for entry in self._added)

    @property
    def special_tokens(self) -> dict[str, str]:
        """The named special tokens, such as bos_token, as chat templates see them."""
        # transformers takes special_tokens_map.json where tokenizer_config.json lists no added tokens.
        tables = [self.config] if "added_tokens_decoder" in self.config else [self.config, self.special_map]
        found = {key: text for table in tables for key, text in _named_tokens(table)}
        if self.as_engine is not None:
            loaded = self.as_engine.special_tokens_map
            found |= {key: str(text) for key, text in loaded.items() if isinstance(text, str)}
        return found

    @property
    def bos(self) -> str:
        """The BOS text, empty where there is none."""
        return self.special_tokens.get("bos_token", "")

    def next_ids(self, k: int) -> list[int]:
        """Return the ids that k added tokens get."""
        # tokenizers numbers an added token after the model's vocabulary or the highest added id.
        start = max([self._model_size, *(token_id + 1 for token_id in self.known)])
        if start < self.size:
            raise DttError(
                f"{self.folder / 'tokenizer.json'} has gaps in its ids, so new tokens would take used ones; "
                "such a tokenizer is not supported."
            )
        return list(range(start, start + k))

    def first_without_row(self, n_rows: int) -> str | None:
        """Return a token that only files beside tokenizer.json, or the class, add behind the last of `n_rows` rows."""
        listed = {entry["id"] for entry in self._added}
        beyond = [token_id for token_id in sorted(self.known) if token_id >= n_rows and token_id not in listed]
        return self.known[beyond[0]].content if beyond else None

    def unused_reserved_ids(self) -> list[int]:
        """Return the ids of reserved tokens that nothing of the model uses, ascending."""
        templates = "".join(self.templates().values())
        named = {text for table in (self.config, self.special_map) for _, text in _named_tokens(table)}
        used = set(self._ids_of_configs())
        reserved = {i: token.content for i, token in self.known.items() if _RESERVED.search(token.content)}
        return sorted(
            token_id
            for token_id, text in (reserved | self._padding).items()
            if text not in templates and text not in named and token_id not in used
        )

    @cached_property
    def _padding(self) -> dict[int, str]:
        """Rows of a padded vocabulary that its GGUF file had to name, `[PAD<id>]`, as no text yields them.

        They are ordinary entries of the vocabulary, so text yields one only where merges make it.
        """
        model = self.tokenizer["model"]
        affixes = [model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")]
        if model.get("type") != "BPE" or model.get("ignore_merges") or any(affixes):
            return {}
        named = {i: text for text, i in model["vocab"].items() if text == f"[PAD{i}]" and i not in self.known}
        merges = model.get("merges") or [] if named else []
        made = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in merges}
        return {i: text for i, text in named.items() if text not in made}

    def reserved_ids(self, k: int) -> list[int]:
        """Return the k highest ids of unused reserved tokens, ascending.

        Raises:
            DttError: there are fewer.
        """
        free = self.unused_reserved_ids()
        if len(free) < k:
            raise DttError(
                f"--reuse-reserved: the tokenizer in {self.folder} has {len(free)} unused reserved tokens and "
                f"{k} are needed; leave the option out, and the vocabulary grows."
            )
        return free[-k:]

    def _ids_of_configs(self) -> Iterator[int]:
        """Yield the ids that config.json and generation_config.json name: pad_token_id and its like."""
        for name in ("config.json", "generation_config.json"):
            config = read_json_table(self.folder / name, missing={})
            for table in text_configs(config):
                for key, value in table.items():
                    if key.endswith(("_token_id", "_token_ids", "_token_index")):
                        yield from (i for i in (value if isinstance(value, list) else [value]) if type(i) is int)

    def templates(self) -> dict[str, str]:
        """Return the model's chat templates by name; the usual one is called "default"."""
        return dict(self._templates)

    def _read_templates(self) -> dict[str, str]:
        path = self.folder / _CONFIG
        stored = self.config.get("chat_template") or []
        try:
            pairs = (
                [(DEFAULT_TEMPLATE, stored)]
                if isinstance(stored, str)
                else list(stored.items())
                if isinstance(stored, dict)
                else [(entry["name"], entry["template"]) for entry in stored]
            )
            if not all(isinstance(part, str) for pair in pairs for part in pair):
                raise TypeError("no text")
        except (KeyError, TypeError) as error:
            raise DttError(f"{path} lists a chat_template without name or template; download it again.") from error
        _check_template_names([name for name, _ in pairs], path)
        found = dict(pairs)
        # Where both exist, transformers takes the files.
        file = self.folder / TEMPLATE_FILE
        if file.is_file():
            found[DEFAULT_TEMPLATE] = self._read_template(file)
        for more in sorted((self.folder / MORE_TEMPLATES).glob("*.jinja")):
            found[more.name.removesuffix(".jinja")] = self._read_template(more)
        _check_template_names(list(found), self.folder / MORE_TEMPLATES)
        return found

    def _read_template(self, path: Path) -> str:
        check_within(path, self.folder)
        try:
            # With the line ends that a text file has in Python, which is how transformers reads it.
            return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8").read()
        except (OSError, UnicodeDecodeError) as error:
            raise DttError(f"{path} can't be read as UTF-8 text; download it again.") from error

    def adds_bos(self) -> bool:
        """Return whether the tokenizer puts a BOS in front of plain text by itself."""
        if not self.bos:
            return False
        if self.as_engine is not None:
            return bool(self.as_engine("a").input_ids[:1] == [self.as_engine.bos_token_id])
        return self.backend.encode("a").ids[:1] == [self.backend.token_to_id(self.bos)]

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
            keep_bos: leave the tokenizer adding a BOS by itself. Without it, nothing stands in front of a text
                but what the template renders, since BOS + DefensiveTokens + BOS is not what the tokens were
                trained with.

        Returns:
            The names of the files written, relative to `folder`.
        """
        entries = [_entry(name, token_id) for name, token_id in zip(names, token_ids, strict=True)]
        tokenizer = copy.deepcopy(self.tokenizer)
        texts = {token_id: token.content for token_id, token in self.known.items()} | self._padding
        replaced = {token_id: text for token_id, text in texts.items() if token_id in token_ids}
        listed = {entry["id"] for entry in self._added}
        # Every token that an engine knows is listed, so that it keeps its id beside the new ones.
        others = [_entry_of(token, token_id) for token_id, token in self.known.items() if token_id not in listed]
        tokenizer["added_tokens"] = sorted(
            [entry for entry in (*self._added, *others) if entry["id"] not in token_ids] + entries,
            key=lambda entry: entry["id"],
        )
        for key in ("truncation", "padding"):
            if tokenizer.get(key):  # it would cut the tokens off, or stand in front of them
                tokenizer[key] = None
        _rename_in_model(tokenizer["model"], replaced, dict(zip(token_ids, names, strict=True)))
        if not keep_bos:
            try:
                tokenizer["post_processor"] = _with_nothing_in_front(tokenizer.get("post_processor"))
            except (AttributeError, KeyError, TypeError, StopIteration) as error:
                raise DttError(
                    f"{self.folder / 'tokenizer.json'} has a post_processor that leaves the text out, or in a spelling "
                    "that the library `tokenizers` does not write; load and save it with that library."
                ) from error
        written = {"tokenizer.json": tokenizer}
        written[_CONFIG] = self._defended_config(entries, replaced, templates, keep_bos)
        if (self.folder / _SPECIAL_MAP).is_file():
            written[_SPECIAL_MAP] = _defended_special_map(self.special_map, entries, replaced)
        if (self.folder / _ADDED).is_file():
            kept = read_json_table(self.folder / _ADDED)
            kept = {token: token_id for token, token_id in kept.items() if token_id not in replaced}
            written[_ADDED] = kept | {entry["content"]: entry["id"] for entry in entries}
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
        if not keep_bos and (self.bos or "add_bos_token" in config):
            config["add_bos_token"] = False  # for classes that add one by themselves
        stored = config.get("chat_template")
        if isinstance(stored, str):
            config["chat_template"] = templates[DEFAULT_TEMPLATE]
        elif isinstance(stored, dict):
            config["chat_template"] = templates
        elif isinstance(stored, list):
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        return config


def _no_tokenizer(folder: Path) -> str:
    if (folder / "tekken.json").is_file():
        return (
            f"{folder} has Mistral's tekken.json and no tokenizer.json, which is what takes DefensiveTokens; give the "
            "checkpoint in Hugging Face's format."
        )
    return (
        f"{folder} has no tokenizer.json; make one with `AutoTokenizer.from_pretrained(...).save_pretrained(folder)`."
    )


def read_backend(path: Path) -> Tokenizer:
    """Load a tokenizer.json with the library `tokenizers`, without its padding and truncation.

    Raises:
        DttError: it refuses the file.
    """
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
        return backend
    except BaseException as error:  # plain Exception, and for some files a panic, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise DttError(f"{path} is no tokenizer that `tokenizers` can load ({error}); download it again.") from error


def _named_tokens(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, token) of the keys like bos_token; a token may be a table with its content."""
    for key, value in table.items():
        if key.endswith("_token") and (text := _text_of(value)):
            yield key, text
    for key in _SPECIAL_LISTS:
        if isinstance(table.get(key), dict):
            yield from ((name, text) for name, value in table[key].items() if (text := _text_of(value)))


def _text_of(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _listed(value: Any, path: Path) -> list[str]:
    """Return the tokens of a list or table of special tokens."""
    values = list(value.values()) if isinstance(value, dict) else value or []
    texts = [_text_of(entry) for entry in values] if isinstance(values, list) else [None]
    if None in texts:
        raise DttError(f"{path} lists special tokens that are no text; correct it, or download it again.")
    return [text for text in texts if text]


def _check_template_names(names: list[str], path: Path) -> None:
    """Refuse names that are no plain file names: each template becomes a file of its name."""
    seen: set[str] = set()
    for name in names:
        if not _TEMPLATE_NAME.fullmatch(name) or len(name.encode()) > 200:
            raise DttError(f"{path} has a chat template called {name[:80]!r}, which is no plain file name; rename it.")
        if name.casefold() in seen:
            raise DttError(f"{path} has two chat templates called {name!r}; remove or rename one of them.")
        seen.add(name.casefold())


def _entry_of(token: AddedToken, token_id: int) -> dict[str, Any]:
    return {"id": token_id, "content": token.content} | {flag: getattr(token, flag) for flag in _FLAGS}


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
    kept = [token for token in tokens if _text_of(token) not in gone]
    return kept + [entry["content"] for entry in entries]


def _defended_special_map(
    table: dict[str, Any], entries: list[dict[str, Any]], replaced: dict[int, str]
) -> dict[str, Any]:
    # transformers takes any setting from this file, a chat template too; only its tokens are kept.
    kept = {key: value for key, value in table.items() if key.endswith("_token") or key in _SPECIAL_LISTS}
    for key in _SPECIAL_LISTS:
        if isinstance(kept.get(key), list):
            kept[key] = _special_list(kept[key], entries, replaced)
    kept.setdefault("additional_special_tokens", [entry["content"] for entry in entries])
    return kept


def _with_nothing_in_front(processor: Any) -> Any:
    """Return a post-processor that puts no token in front of a text; None where nothing is left of it."""
    if not isinstance(processor, dict):
        return processor
    kind = processor.get("type")
    if kind == "Sequence":
        parts = [_with_nothing_in_front(part) for part in processor["processors"]]
        return {**processor, "processors": [part for part in parts if part is not None]}
    if kind in ("BertProcessing", "RobertaProcessing"):  # a token in front and one behind
        return None
    if kind == "TemplateProcessing":
        first = next(index for index, piece in enumerate(processor["single"]) if "Sequence" in piece)
        in_front = {piece["SpecialToken"]["id"] for piece in processor["single"][:first]}
        trimmed = dict(processor)
        for key in ("single", "pair"):
            pieces = processor[key]
            trimmed[key] = [piece for piece in pieces if piece.get("SpecialToken", {}).get("id") not in in_front]
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
