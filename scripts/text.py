"""Text as bytes: training sequences that any rank can draw for any step, and a fixed held-out part.

The default text is one that every machine with Python has, the source of its standard library (8 MB of
`*.py`, without tests and tables). `--text PATH` names any file or folder instead. Nothing is downloaded and
nothing is stored. A batch is a function of (seed, rank, step), so ranks read different text and a resumed run
goes on where it would have been.
"""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_EVERY = 20  # documents 10, 30, 50, ... are never trained on
DOCUMENT_BYTES = 64 * 1024  # longer files are cut, and a short text into at least 40 documents
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


class ByteText:
    """The bytes of `path` (a file, a folder, or None for the standard library), in a training and a held-out
    part.

    Of a text above `max_bytes` an evenly spread choice of documents is kept.
    """

    def __init__(self, path: Path | None = None, *, max_bytes: int = 8_000_000):
        self.name = "the Python standard library's source" if path is None else str(path)
        documents = read_documents(path)
        share = min(1.0, max_bytes / max(1, sum(map(len, documents))))
        # Every k-th document, not the first ones: "a" to "m" of a library is not the library.
        documents = [d for i, d in enumerate(documents) if int((i + 1) * share) > int(i * share)]
        held_out = documents[HELD_OUT_EVERY // 2 - 1 :: HELD_OUT_EVERY]
        del documents[HELD_OUT_EVERY // 2 - 1 :: HELD_OUT_EVERY]
        self.train = torch.frombuffer(bytearray(b"\n".join(documents)) or bytearray(1), dtype=torch.uint8)
        self.held_out = torch.frombuffer(bytearray(b"\n".join(held_out)) or bytearray(1), dtype=torch.uint8)

    @classmethod
    def whole(cls, path: Path) -> "ByteText":
        """Return the bytes of `path`, all of them held out."""
        text = cls.__new__(cls)
        text.name, text.train = str(path), torch.zeros(0, dtype=torch.uint8)
        text.held_out = torch.frombuffer(bytearray(b"\n".join(read_documents(path))), dtype=torch.uint8)
        return text

    def batch(
        self, *, batch: int, seq: int, seed: int, rank: int, step: int, part: tuple[int, int] = (0, 1)
    ) -> tuple[Tensor, Tensor]:
        """Draw inputs and targets, both [batch, seq] int64, at random places of the k-th of n parts of the
        training text; part = (k, n)."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + rank) * 1_000_003 + step)
        places, (k, n) = self._places(self.train, seq), part
        starts = torch.randint(places * k // n, places * (k + 1) // n, (batch,), generator=generator)
        return cut(self.train, starts, seq)

    def held_out_batches(
        self, *, tokens: int, batch: int, seq: int, rank: int, ranks: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Cut about `tokens` evenly spread bytes of the held-out part into batches, equally many for each
        rank."""
        places = self._places(self.held_out, seq)
        count = max(1, min(tokens, len(self.held_out)) // (batch * seq * ranks)) * batch * ranks
        starts = torch.linspace(0, places - 1, count).long()
        return [cut(self.held_out, s, seq) for s in starts[rank::ranks].split(batch)]

    def _places(self, data: Tensor, seq: int) -> int:
        if len(data) <= seq:
            raise ValueError(
                f"training and held-out text must be longer than a sequence of {seq} bytes, got "
                f"{len(self.train)} and {len(self.held_out)} bytes from {self.name}; give a longer text or "
                "a shorter --seq"
            )
        return len(data) - seq


def cut(data: Tensor, starts: Tensor, seq: int) -> tuple[Tensor, Tensor]:
    windows = data[starts[:, None] + torch.arange(seq + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def read_documents(path: Path | None) -> list[bytes]:
    """Read the UTF-8 files of `path`, in sorted order, and cut them into documents of at most
    DOCUMENT_BYTES."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts)]
    elif path.is_dir():
        root = path
        files = [f for f in root.rglob("*") if f.is_file()]
    elif path.is_file():
        root, files = path.parent, [path]
    else:
        raise ValueError(f"--text must name a file or a folder, got {str(path)!r}, which does not exist")
    files.sort(key=lambda f: f.relative_to(root).as_posix())
    texts = [data for f in files if is_text(data := f.read_bytes())]
    if not texts:
        raise ValueError(
            f"--text must hold UTF-8 text, got {len(files)} files and none that is, in {path or root}"
        )
    size = min(DOCUMENT_BYTES, -(-sum(map(len, texts)) // (2 * HELD_OUT_EVERY)))
    return [data[i : i + size] for data in texts for i in range(0, len(data), size)]


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return bool(data.strip())
