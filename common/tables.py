"""Tables of images: parquet and arrow files, `save_to_disk`'s folders, and data sets of the Hub.

A column is found by its kind and name; labels are read without the images. Arrow files are read
where they are. Parquet is made for reading in order: to read its rows in any order, `datasets`
copies it once, as Arrow, into its cache.

Nothing here imports torch. Symbols: N rows.
"""

import contextlib
import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.errors import UserError, first_line, shown

USUAL = ("label", "labels", "fine_label", "class", "target")  # names of columns of labels
WORTH_TELLING = 10  # MB that are copied
TAIL = 2**20  # bytes at the end of a file, where Parquet keeps its footer


def is_table(path: str) -> bool:
    return path.lower().endswith((".parquet", ".arrow"))


class Table:
    """N rows with named columns: of files, or of a loaded data set.

    Args:
        files: that hold it, all of them parquet or all of them arrow; the state.json of a folder
            that `save_to_disk` wrote stands for its tables.

    Attributes:
        features: the kinds of the columns, as of `datasets`.
        rows: N.
    """

    local = True  # whether it is on this disk

    def __init__(self, files: Sequence[str], source: str) -> None:
        import datasets  # takes half a second to import, and folders of images do not need it

        self.files, self.source, self.notes = list(files), source, list[str]()
        self.parquet = files[0].lower().endswith(".parquet")
        self._dataset: Any = None
        try:
            if self.parquet:
                import pyarrow.parquet as pq

                metadata = [read_each(pq.read_metadata, file, source) for file in files]
                schemas = [each.schema.to_arrow_schema() for each in metadata]
                self.rows = sum(each.num_rows for each in metadata)
                kinds = [datasets.Features.from_arrow_schema(schema) for schema in schemas]
                self.features = kinds[0]
            else:
                parts = [read_each(arrow, file, source) for file in files]
                kinds = [part.features for part in parts]
                self.rows, self.features = sum(map(len, parts)), kinds[0]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{source}: {first_line(error)}") from error
        check_alike(source, [(os.path.basename(f), k) for f, k in zip(files, kinds, strict=True)])
        if not self.parquet:
            try:
                parts = [part.select_columns(list(self.features)) for part in parts]
                self._dataset = datasets.concatenate_datasets(parts)
            except Exception as error:
                raise UserError(f"{source}: {first_line(error)}") from error

    @property
    def dataset(self) -> Any:
        """The rows as a `datasets.Dataset`."""
        if self._dataset is None:
            import datasets

            datasets.disable_progress_bars()
            try:  # the name tells a table that was rewritten from the one that the cache holds
                self._dataset = datasets.load_dataset(
                    "parquet", identity(self.files), data_files=self.files, split="train"
                )
            except OSError as error:
                cache = datasets.config.HF_DATASETS_CACHE
                raise UserError(
                    f"{self.source}: {first_line(error)}; the cache is {cache} (HF_HOME moves it)"
                ) from error
            except Exception as error:
                raise UserError(f"{self.source}: {first_line(error)}") from error
        return self._dataset

    def column(self, name: str) -> list[Any]:
        """The N values of a column, without the others."""
        if self._dataset is None:
            import pyarrow.parquet as pq

            return [
                v for f in self.files for v in pq.read_table(f, columns=[name])[name].to_pylist()
            ]
        return self._dataset.select_columns(name).with_format("arrow")[:][name].to_pylist()

    def sample(self, name: str, count: int) -> Iterator[Any]:
        """Up to `count` cells of a column: evenly spaced, or of parquet the first of each part."""
        if self._dataset is not None:
            table = self._dataset.select_columns(name).with_format("arrow")
            for i in (k * len(table) // count for k in range(min(count, len(table)))):
                yield table[i][name][0].as_py()
            return
        import pyarrow.parquet as pq

        opened = [pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16) for file in self.files]
        groups = [(file, i) for file in opened for i in range(file.num_row_groups)]
        groups = groups[:: max(1, -(-len(groups) // count))]
        each = -(-count // max(1, len(groups)))
        for file, i in groups:
            for batch in file.iter_batches(each, row_groups=[i], columns=[name]):
                yield from batch.column(0).to_pylist()
                break

    def labels(self, name: str) -> tuple[list[Any], tuple[str, ...]]:
        """The N values of a column of labels, None where one is missing, and names in an order.

        The names are those of a column that lists them; a value is then one of them. Of a column
        of lists each value is a list.
        """
        import datasets

        kind, values = self.features[name], self.column(name)
        if inner := list_element(kind):
            names = tuple(inner.names) if isinstance(inner, datasets.ClassLabel) else ()
            values = [None if has_unknown(value) else value for value in values]
            if names:
                values = [v if v is None else [names[each] for each in v] for v in values]
            return values, names
        if isinstance(kind, datasets.ClassLabel):
            known = [None if v is None or v < 0 else kind.names[v] for v in values]  # -1: not known
            return known, tuple(kind.names)
        return tidy(values), ()


class HubTable(Table):
    """A split of a data set on the Hub, fetched when its rows are asked for."""

    def __init__(self, name: str, configuration: str, split: str, features: Any, rows: Any) -> None:
        self.source, self.configuration, self.split = name, configuration, split
        self.features, self.rows, self.files, self.notes = features, rows, [], []
        self._dataset = None

    @property
    def local(self) -> bool:  # type: ignore[override]
        return self._dataset is not None

    @property
    def dataset(self) -> Any:
        import datasets

        if self._dataset is None:
            with hub_errors(self.source):
                more = named(self.configuration)
                self._dataset = datasets.load_dataset(self.source, split=self.split, **more)
            self.features, self.rows = self._dataset.features, len(self._dataset)
            self.files = [file["filename"] for file in self._dataset.cache_files]
        return self._dataset

    def column(self, name: str) -> list[Any]:
        self.dataset  # noqa: B018
        return super().column(name)


def opened(files: Sequence[str], source: str) -> Table:
    """The rows of some files.

    Raises:
        UserError: one cannot be read, or they differ in kind or columns.
    """
    kinds = {os.path.splitext(file)[1].lower() for file in files}
    if len(kinds) > 1:
        raise UserError(f"{source}: tables of several kinds, {', '.join(sorted(kinds))}; give one")
    table = Table(files, source)
    size = sum(os.path.getsize(file) for file in files if os.path.isfile(file)) / 2**20
    if table.parquet and size > WORTH_TELLING and not cached(files):
        import datasets

        where = datasets.config.HF_DATASETS_CACHE
        table.notes.append(
            f"{size:,.0f} MB of parquet are copied once to {where} (HF_HOME moves it)"
        )
    return table


def arrow(file: str) -> Any:
    """An arrow file, or the folder of a state.json, as a data set; nothing is copied."""
    import datasets
    import pyarrow as pa

    if os.path.basename(file) == "state.json":
        return datasets.load_from_disk(os.path.dirname(file))
    with open(file, "rb") as opened_file:
        in_parts = opened_file.read(6) == b"ARROW1"  # the file format of IPC, not the stream's
    if in_parts:
        return datasets.Dataset(pa.ipc.open_file(pa.memory_map(file)).read_all())
    return datasets.Dataset.from_file(file)


def read_each(read: Callable[[str], Any], file: str, source: str) -> Any:
    """What `read` makes of a file.

    Raises:
        UserError: it cannot be read; with its name.
    """
    if shown(file) != file:
        raise UserError(
            f"{source}: {os.path.basename(file)}: a table's path must be UTF-8; rename it"
        )
    try:
        return read(file)
    except Exception as error:
        raise UserError(f"{source}: {why_unread(file, error)}") from error


def saved_files(folder: str) -> list[str]:
    """The names of the tables that a folder of `save_to_disk` says that it holds."""
    try:
        with open(os.path.join(folder, "state.json")) as file:
            return [str(each["filename"]) for each in json.load(file)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def why_unread(file: str, error: Exception) -> str:
    """Why a table cannot be read, with its name."""
    with contextlib.suppress(OSError), open(file, "rb") as opened_file:
        if opened_file.read(24).startswith(b"version https://git-lfs"):
            return f"{os.path.basename(file)} is a pointer of git-lfs; git lfs pull fetches it"
    return f"{os.path.basename(file)}: {first_line(error)}"


def joined(tables: Sequence[Table]) -> Table:
    """The rows of all."""
    import datasets

    first = tables[0]
    if not isinstance(first, HubTable):
        return opened([file for table in tables for file in table.files], first.source)
    whole = HubTable(first.source, first.configuration, "all", first.features, None)
    whole._dataset = datasets.concatenate_datasets([table.dataset for table in tables])
    whole.rows, whole.files = len(whole._dataset), [f for table in tables for f in table.files]
    return whole


def identity(files: Sequence[str]) -> str:
    """A name for the content of some tables: of their sizes, times and last mebibytes."""
    digest = hashlib.sha256()
    for file in files:
        stat = os.stat(file)
        digest.update(repr((os.path.abspath(file), stat.st_size, stat.st_mtime_ns)).encode())
        digest.update(tail(file))
    return f"images-{digest.hexdigest()[:16]}"


def tail(path: str) -> bytes:
    """The last bytes of a file; none of one that cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - TAIL))
            return file.read()
    except OSError:
        return b""


def cached(files: Sequence[str]) -> bool:
    """Whether `datasets` has a copy of parquet files already."""
    import datasets

    folder = os.path.join(datasets.config.HF_DATASETS_CACHE, "parquet")
    known = os.listdir(folder) if os.path.isdir(folder) else []
    name = identity(files)
    return any(each.startswith(name) for each in known)


# ---- columns -------------------------------------------------------------------------------------


def image_column(table: Table, source: str, name: str | None = None) -> str:
    """The column of images: the named one, or the only one of that kind.

    Raises:
        UserError: there is no such column, or there are several.
    """
    columns = table.features
    check_column(table, source, name)
    pictures = [each for each, kind in columns.items() if is_image(kind)]
    if name is None and len(pictures) != 1:
        several = f"several image columns ({', '.join(pictures)})"
        problem = several if pictures else "no image column"
        raise UserError(f"{source}: {problem} among {', '.join(columns)}; say --image-column NAME")
    return name or pictures[0]


def label_column(table: Table, source: str, name: str | None = None) -> str | None:
    """The column of labels: the named one, or one known by its kind or name; None without one.

    Raises:
        UserError: there is no such column, or it holds no labels.
    """
    import datasets

    columns = table.features
    check_column(table, source, name)
    single = [n for n, kind in columns.items() if isinstance(kind, datasets.Value)]
    classed = [n for n, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    if name is None:
        plain = [each for each in USUAL if each in single + classed]
        lists = [each for each in (*USUAL, "classes") if list_element(columns.get(each))]
        return next(iter(plain + classed + lists), None)
    if name not in single + classed and not list_element(columns[name]):
        raise UserError(f"{source}: {name!r} holds no labels, a value or a list of values")
    return name


def check_alike(source: str, kinds: Sequence[tuple[str, Any]]) -> None:
    """Refuse tables that are read as one though their columns differ, or the classes they list.

    Args:
        kinds: the name of each and the features of `datasets`.

    Raises:
        UserError: with the first that differs.
    """
    first, features = kinds[0]
    for name, other in kinds[1:]:
        if set(other) != set(features):
            raise UserError(
                f"{source}: {name} has the columns {', '.join(other)}, and {first} "
                f"{', '.join(features)}; give one of them"
            )
        for column, kind in features.items():
            if class_names(kind) != class_names(other[column]):
                raise UserError(
                    f"{source}: {name} and {first} list other classes for {column!r}, or in "
                    "another order; give one of them"
                )


def class_names(kind: Any) -> Any:
    """The classes that a column lists, or a column of lists; else None."""
    return getattr(list_element(kind) or kind, "names", None)


def other_labels(table: Table, name: str) -> list[str]:
    """The columns that list classes, apart from the one that is taken."""
    columns = table.features.items()
    return [each for each, kind in columns if class_names(kind) and each != name]


def check_column(table: Table, source: str, name: str | None) -> None:
    if name is not None and name not in table.features:
        raise UserError(f"{source}: no column {name!r}; it has {', '.join(table.features)}")


def list_element(kind: Any) -> Any:
    """What a column of lists holds lists of, if that can be labels, else None."""
    import datasets

    inner = getattr(kind, "feature", None)  # of List, and of Sequence in older versions
    return inner if isinstance(inner, datasets.Value | datasets.ClassLabel) else None


def is_image(kind: Any) -> bool:
    """An Image feature, or the struct of bytes and path that plain parquet files keep of one."""
    import datasets

    return isinstance(kind, datasets.Image) or (isinstance(kind, dict) and "bytes" in kind)


def has_unknown(labels: Sequence[Any] | None) -> bool:
    """Whether a list of labels is missing, or one in it: None, NaN, -1 or an empty text."""
    return labels is None or any(v is None or v in (-1, "") or v != v for v in labels)


def tidy(values: Sequence[Any]) -> list[Any]:
    """Labels with None for NaN and for an empty text; whole numbers as such, though kept as 1.0.

    A column of integers becomes one of floats where a value is missing, in pandas and by NaN.
    """
    known = [
        None if value == "" or (isinstance(value, float) and math.isnan(value)) else value
        for value in values
    ]
    floats = [value for value in known if isinstance(value, float)]
    if floats and all(value.is_integer() for value in floats):
        return [int(value) if isinstance(value, float) else value for value in known]
    return known


def metadata_rows(path: str) -> list[dict[str, Any]] | None:
    """The rows of a metadata.csv or metadata.jsonl; None where they do not name files.

    Raises:
        UserError: it cannot be read, or a row has more fields than there are columns.
    """
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
            return rows if not rows or "file_name" in rows[0] else None
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.lower().endswith(".csv"):
                reader = csv.DictReader(file, restkey="")
                rows = [
                    dict(row)
                    for row in reader
                    if any("".join(value or "") for value in row.values())
                ]
                names = [name.strip() for name in reader.fieldnames or ()]
            else:
                rows = [json.loads(line) for line in file if line.strip()]
                names = [str(name) for row in rows for name in row]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8, or move it away") from error
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    if "file_name" not in names or not all(isinstance(row, dict) for row in rows):
        return None
    for row in rows:
        if "" in row:
            raise UserError(
                f"{path}: more fields than columns in the row of {row.get('file_name')}; a text "
                "with a comma needs quotes"
            )
    return numbers(rows) if path.lower().endswith(".csv") else rows


def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of texts with integers in the columns that hold nothing else, so that 9 is before 10.

    Not where a number is written in another way, as 007 is, which may be another label than 7.
    """
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows if row.get(name)]
        if name != "file_name" and values and all(is_integer(value) for value in values):
            for row in rows:
                row[name] = int(row[name]) if row.get(name) else None
    return rows


def is_integer(text: str) -> bool:
    return bool(re.fullmatch(r"-?\d+", text)) and str(int(text)) == text


# ---- the Hub -------------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """An error of the block as one line that names the data set."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = first_line(error)
        raise UserError(f"{name}: not a local path, and the Hub said: {said}") from error


def of_hub(name: str, configuration: str) -> tuple[dict[str, Table], list[str]]:
    """The splits of a data set on the Hub, which are not fetched yet.

    Raises:
        UserError: the Hub cannot be reached, or has no such data set, or it has several
            configurations and none is named.
    """
    import datasets
    import huggingface_hub

    notes = []
    try:  # what follows this would try again for half a minute
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # the Hub answers; the calls below have the better message
    except Exception as error:
        raise UserError(
            f"{name}: not a local path, and the Hub cannot be reached ({first_line(error)}); "
            "HF_HUB_OFFLINE=1 uses what is in its cache"
        ) from error
    with hub_errors(name):
        names = datasets.get_dataset_config_names(name)
        if configuration and configuration not in names:
            raise UserError(f"{name}: no configuration {configuration!r}; {', '.join(names)}")
        if len(names) > 1 and not configuration:
            configuration = datasets.get_dataset_default_config_name(name) or ""
            others = ", ".join(each for each in names if each != configuration)
            if not configuration:
                raise UserError(
                    f"{name}: several configurations, {others}; say one: --data {name}:{names[0]}"
                )
            notes.append(f"configuration {configuration}, its default; not read: {others}")
        builder = datasets.load_dataset_builder(name, **named(configuration))
        splits = {each: known.num_examples for each, known in (builder.info.splits or {}).items()}
        if not splits:
            more = (configuration,) if configuration else ()
            splits = dict.fromkeys(datasets.get_dataset_split_names(name, *more))
    kinds = builder.info.features
    return {s: HubTable(name, configuration, s, kinds, n) for s, n in splits.items()}, notes


def named(configuration: str) -> dict[str, str]:
    """The argument of `datasets` for a configuration, if there is one."""
    return {"name": configuration} if configuration else {}
