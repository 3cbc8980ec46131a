"""Exact retrieval metrics of embeddings: mAP over the full ranking and CMC@k, by counting instead of sorting.

AP needs no ranking, only two counts at each positive: how many positives and how many negatives score at least as much.
With ">=" on both sides this is `sklearn.metrics.average_precision_score`, ties included (a tied block is judged at its
end), whatever the order of the gallery. CMC@k (first match, as in BCT and BT2) needs one count, at the best positive.
So a chunk of queries costs one matrix product and one pass over its scores; no queries x gallery matrix is ever kept.

Positives are taken out of the scores as they are read and only negatives are counted, so that a positive cannot miss
itself through the last bit of another product: (positives + negatives) >= positives by construction.

Counts add up over the parts of a gallery: `rank_sharded` serves galleries beyond one memory or one machine.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Similarity = Literal["cosine", "l2"]
Backend = Literal["lookup", "compare", "sort"]


@dataclass(frozen=True)
class Ranking:
    """What is known of each query, in the queries' order, on the CPU."""

    ap: Tensor  # (Nq,) float64 in (0, 1], nan where the query has no positive
    first: Tensor  # (Nq,) int64, rank of the best positive from 1 on, ties counted against it; 0 = no positive
    positives: Tensor  # (Nq,) int64

    def metrics(self, ks: Sequence[int] = (1, 5), select: Tensor | None = None) -> dict[str, float | int | None]:
        """Means in [0, 1] over the queries that have a positive (None if there are none), and how many were dropped.

        `select` (Nq,) bool restricts them to a stratum.
        """
        if select is not None and (select.dtype != torch.bool or select.shape != self.first.shape):
            raise ValueError(f"select must be a bool mask of {len(self.first)} queries, got {_describe(select)}")
        ap, first = (x if select is None else x[select.cpu()] for x in (self.ap, self.first))
        kept = first > 0
        means = {f"cmc@{k}": (first[kept] <= k).double().mean() for k in ks} | {"map": ap[kept].mean()}
        n = int(kept.sum())
        return {k: float(v) if n else None for k, v in means.items()} | {"queries": n, "dropped": len(first) - n}


def rank(
    queries: Tensor,  # (Nq, D) floats
    gallery: Tensor,  # (Ng, D) floats
    query_labels: Tensor,  # (Nq,) integers
    gallery_labels: Tensor,  # (Ng,) integers
    *,
    query_ids: Tensor | None = None,  # (Nq,) integers
    gallery_ids: Tensor | None = None,  # (Ng,) integers, unique
    similarity: Similarity = "cosine",
    device: torch.device | str | None = None,
    buffer_mb: int = 64,
    backend: Backend | None = None,
) -> Ranking:
    """Rank the whole gallery for every query; the positives of a query are the gallery items of its label.

    With ids, the gallery item that has the query's own id is no candidate, whichever model embedded it. "cosine" is
    computed in fp32 on vectors normalised here, "l2" ranks by distance. `device` computes the scores (default: the
    queries' own), `buffer_mb` MiB hold them. `backend` does the counting; None takes the fastest, all agree.

    Raises ValueError for unequal dims, labels or ids that do not fit, rows with NaN or infinity, zero vectors under
    "cosine", empty input.
    """
    block = Block(torch.arange(len(gallery)), queries, gallery)
    return Cell(
        [block], query_labels, gallery_labels, query_ids, gallery_ids, similarity, device, buffer_mb, backend
    ).rank()


def rank_sharded(shards: Iterable["Cell"]) -> Ranking:
    """As `rank`, for the same queries against a gallery in parts; exact, whatever their number.

    `shards` is gone through twice: a list, or an object whose iterator loads one part at a time. Over machines:
    all-gather `thresholds`, `join` them, all-reduce `count`, `merge`.
    """
    top = join([shard.thresholds() for shard in shards])
    counts = [shard.count(top) for shard in shards]
    if not counts:
        raise ValueError("shards can be gone through only once: pass a list, or an object whose __iter__ starts afresh")
    return merge(top, sum(counts[1:], counts[0]))


def join(thresholds: Sequence[Tensor]) -> Tensor:
    """The positives' scores of all shards, (Nq, P) descending, filled up with -inf."""
    if not thresholds:
        raise ValueError("no shards: the gallery is empty")
    top = torch.cat(list(thresholds), 1).sort(1, descending=True).values
    return top[:, : max(1, int((top > -torch.inf).sum(1).max()))].contiguous()


def merge(top: Tensor, above: Tensor) -> Ranking:
    """The ranking from the positives' scores (Nq, P) and the negatives counted at each, summed over all shards."""
    if top.shape != above.shape:
        raise ValueError(f"merge needs a count for every threshold, got {_describe(above)} for {_describe(top)}")
    parts = [_finish(t, a) for t, a in zip(top.split(1024), above.split(1024))]
    return Ranking(*(torch.cat(x) for x in zip(*parts)))


class Block(NamedTuple):
    """Some items of a gallery with the query vectors that serve them; a gallery in mid-backfill has several blocks."""

    rows: Tensor  # (n,) positions in the gallery list
    queries: Tensor  # (Nq, D); D may differ between blocks
    gallery: Tensor  # (n, D)


class Cell:
    """Queries against one gallery, or one shard of it: checked input, and scores in chunks. Arguments as for `rank`."""

    def __init__(
        self,
        blocks: Sequence[Block],
        query_labels: Tensor,
        gallery_labels: Tensor,
        query_ids: Tensor | None = None,
        gallery_ids: Tensor | None = None,
        similarity: Similarity = "cosine",
        device: torch.device | str | None = None,
        buffer_mb: int = 64,
        backend: Backend | None = None,
    ):
        if similarity not in ("cosine", "l2"):
            raise ValueError(f"similarity must be 'cosine' or 'l2', got {similarity!r}")
        if backend not in (None, "lookup", "compare", "sort"):
            raise ValueError(f"backend must be None, 'lookup', 'compare' or 'sort', got {backend!r}")
        if (query_ids is None) != (gallery_ids is None):
            raise ValueError("give both query_ids and gallery_ids (to exclude each query's own item) or neither")
        blocks = [b for b in blocks if len(b.rows)] or blocks[:1]  # a backfill begins and ends with an empty block
        for block in blocks:
            _check_vectors("queries", block.queries)
            _check_vectors("gallery", block.gallery)
        nq, ng = len(blocks[0].queries), sum(len(b.gallery) for b in blocks)
        _check_integers("query_labels", query_labels, nq)
        _check_integers("gallery_labels", gallery_labels, ng)
        rows = torch.cat([b.rows.cpu() for b in blocks])  # column of the scores -> place in the gallery list
        if not torch.equal(rows.sort().values, torch.arange(ng)):
            raise ValueError(f"the blocks' rows must name each of the {ng} gallery items once")

        self.nq, self.ng, self.buffer_mb, self.backend, self.similarity = nq, ng, buffer_mb, backend, similarity
        self.device = torch.device(device or blocks[0].queries.device)
        self.blocks = [self._prepare(b) for b in blocks]
        wanted = query_labels.cpu().long()
        labels, self.by_label = gallery_labels.cpu().long()[rows].sort(stable=True)  # columns grouped by label
        self.start = torch.searchsorted(labels, wanted)
        self.positives = torch.searchsorted(labels, wanted, right=True) - self.start  # the query's own item included
        self.own = torch.full((nq,), ng)  # column of the query's own item; ng = not in this gallery
        if query_ids is not None and gallery_ids is not None:
            _check_integers("query_ids", query_ids, nq)
            _check_integers("gallery_ids", gallery_ids, ng)
            wanted = query_ids.cpu().long()
            ids, column = gallery_ids.cpu().long()[rows].sort()
            if len(twice := ids[1:][ids[1:] == ids[:-1]]):
                raise ValueError(f"gallery_ids must be unique, but id {int(twice[0])} occurs more than once")
            at = torch.searchsorted(ids, wanted).clamp_(max=ng - 1)
            self.own = torch.where(ids[at] == wanted, column[at], self.own)

    def rank(self) -> Ranking:
        def judge(rows: Tensor, scores: Tensor, columns: Tensor):
            top = _take(scores, columns)
            return rows, *_finish(top, _count(scores, top, self.backend))

        rows, *values = (torch.cat(x) for x in zip(*self._map(judge)))
        back = rows.argsort()
        return Ranking(*(x[back] for x in values))

    def thresholds(self) -> Tensor:
        """Scores of each query's positives: (Nq, P) float32, descending, filled up with -inf."""
        top = torch.full((self.nq, max(1, int(self.positives.max()))), -torch.inf)

        def read(rows: Tensor, scores: Tensor, columns: Tensor) -> None:
            top[rows, : columns.shape[1]] = _take(scores, columns).cpu()

        self._map(read)
        return top

    def count(self, top: Tensor) -> Tensor:
        """Negatives here that score at least `top`, (Nq, P) int64; it means nothing where `top` is -inf."""
        above = torch.empty(top.shape, dtype=torch.int64)

        def tally(rows: Tensor, scores: Tensor, columns: Tensor) -> None:
            scores.scatter_(1, columns, -torch.inf)
            above[rows] = _count(scores, top[rows].to(scores.device), self.backend).cpu()

        self._map(tally)
        return above

    def _prepare(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """The block's queries, what they are to be divided or moved by, and its gallery ready for the product."""
        (n, dim), (m, gallery_dim) = block.queries.shape, block.gallery.shape
        if dim != gallery_dim:
            raise ValueError(
                f"queries have {dim} dims, the gallery has {gallery_dim}: declare a link (adapter) for them"
            )
        if n != self.nq or m != len(block.rows):
            raise ValueError(f"a block needs {self.nq} queries and {len(block.rows)} gallery items, got {n} and {m}")
        length = _lengths("queries", block.queries, self.similarity)  # (Nq, 1)
        gallery_length = _lengths("gallery", block.gallery, self.similarity)
        gallery = block.gallery.detach().to(self.device, torch.float32)
        if self.similarity == "cosine":
            return block.queries, length, gallery / gallery_length.to(self.device)
        # -|q - g|^2 = [q, 1, |q|^2] . [2g, -|g|^2, -1] is one product, with an error of 1e-7 (|q|^2 + |g|^2). To keep
        # it small the origin moves to the queries' mean, on a grid of a power of two so that exact inputs stay exact.
        origin = block.queries.detach().float().mean(0)
        variance = float(length.double().square().mean() - origin.double().square().sum()) / dim
        if variance > 0:
            grid = 2.0 ** round(math.log2(variance) / 2)
            origin = (origin / grid).round() * grid
        gallery = gallery - origin.to(self.device)
        square = gallery.square().sum(1, keepdim=True)
        return block.queries, origin, torch.cat([2 * gallery, -square, torch.full_like(square, -1)], 1)  # (m, D + 2)

    def score(self, rows: Tensor, out: Tensor) -> None:
        """Scores of the queries `rows` (B,) against the whole gallery, block after block, into out (B, Ng)."""
        column = 0
        with _true_fp32():
            for queries, by, gallery in self.blocks:
                q = queries[rows].to(self.device, torch.float32)
                if self.similarity == "cosine":
                    q = q / by[rows].to(self.device)
                else:
                    q = q - by.to(self.device)
                    square = q.square().sum(1, keepdim=True)
                    q = torch.cat([q, torch.ones_like(square), square], 1)
                torch.mm(q, gallery.T, out=out[:, column : column + len(gallery)])
                column += len(gallery)

    def _map(self, judge: Callable[[Tensor, Tensor, Tensor], T]) -> list[T]:
        """judge(rows (B,), scores (B, W), columns (B, P) of the positives) for all queries, slice by slice.

        W > Ng: the columns from Ng on hold -inf, as does the query's own item; `columns` is filled up with Ng. Queries
        come ordered by their number of positives, so that P fits the slice. `judge` may overwrite the scores.
        """
        width = 16 * (self.ng // 16 + 1)  # aligned rows: the product runs up to 1.4 times as fast
        size = max(16, self.buffer_mb * 2**20 // (4 * width))
        order = self.positives.argsort(stable=True)
        buffer = torch.empty(min(size, self.nq), width, device=self.device)

        def work(rows: Tensor, scores: Tensor) -> T:
            return judge(rows, scores, self._candidates(rows, scores))

        # On the CPU, threads of ours share a chunk in slices too small for torch to start its own, each operation of
        # which waits a time slice (8 ms) where another process keeps a core busy.
        few = size
        if self.device.type == "cpu":
            few = max(1, min(2**15 // max(1, int(self.positives.max())), -(-size // torch.get_num_threads())))
        results: list[T] = []
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for rows in order.split(size):
                scores = buffer[: len(rows)]
                self.score(rows, scores[:, : self.ng])
                results += pool.map(work, rows.split(few), scores.split(few))
        return results

    def _candidates(self, rows: Tensor, scores: Tensor) -> Tensor:
        """Columns (B, P) of the positives of the queries `rows`; hides in their scores what is no candidate."""
        scores[:, self.ng :] = -torch.inf
        scores.scatter_(1, self.own[rows, None].to(self.device), -torch.inf)
        return self.columns(rows).to(self.device)

    def columns(self, rows: Tensor) -> Tensor:
        """(B, P) columns of the positives of the queries `rows`, filled up with Ng."""
        reach = torch.arange(max(1, int(self.positives[rows].max())))
        columns = self.by_label[(self.start[rows, None] + reach).clamp_(max=len(self.by_label) - 1)]
        columns[reach >= self.positives[rows, None]] = self.ng
        return columns


def _take(scores: Tensor, columns: Tensor) -> Tensor:
    """The positives' scores (B, P), descending, filled up with -inf; only negatives remain in `scores`."""
    top = scores.gather(1, columns).sort(1, descending=True).values
    scores.scatter_(1, columns, -torch.inf)
    return top


def _count(scores: Tensor, top: Tensor, backend: Backend | None) -> Tensor:
    """above[q, j] = number of scores[q] >= top[q, j], (B, P) int64."""
    if backend is None:
        backend = "lookup" if scores.device.type == "cpu" else "compare" if top.shape[1] <= 128 else "sort"
    if backend == "compare":
        return torch.stack([(scores >= threshold[:, None]).sum(1) for threshold in top.T], 1)
    if backend == "sort":
        return scores.shape[1] - torch.searchsorted(scores.sort(1).values, top)
    from benchmark import kernels

    above = torch.zeros(top.shape, dtype=torch.int64)
    kernels.count(scores.cpu().numpy(), top.cpu().numpy(), above.numpy())
    return above.to(scores.device)


def _finish(top: Tensor, above: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ap, first, positives (B,) from thresholds and counts (B, P)."""
    top, above = top.cpu(), above.cpu()
    valid = top > -torch.inf
    n = valid.sum(1)
    at_least = torch.searchsorted(-top, -top, right=True)  # (B, P) positives scoring >= each positive
    precision = (at_least / (at_least + above).double()).masked_fill_(~valid, 0)
    ap = precision.cumsum(1)[:, -1] / n  # cumsum adds in one fixed order, whatever P is; 0 / 0 = nan
    return ap, torch.where(n > 0, above[:, 0] + 1, 0), n


@contextmanager
def _true_fp32():
    """Products in full fp32 (no TF32, no bf16) and without gradients; the caller's settings come back after."""
    old = not hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch < 2.9
    name, off = ("allow_tf32", False) if old else ("fp32_precision", "ieee")
    switches = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    before = [(s, getattr(s, name)) for s in switches if hasattr(s, name)]
    try:
        for switch, _ in before:
            setattr(switch, name, off)
        with torch.no_grad():  # autocast leaves products with `out` alone
            yield
    finally:
        for switch, value in before:
            setattr(switch, name, value)


def _lengths(name: str, x: Tensor, similarity: Similarity) -> Tensor:
    """(N, 1) float32; refuses rows that cannot be ranked."""
    lengths = torch.cat([part.detach().float().double().norm(dim=1, keepdim=True) for part in x.split(4096)])
    for bad, what in (
        (~lengths.isfinite(), "rows with NaN or infinity: look for a diverged model or an overflow in half precision"),
        ((lengths < 1e-30) & (similarity == "cosine"), "zero vectors, which have no cosine: look for a dead layer"),
        (lengths > 1e18, "rows longer than 1e18, whose products overflow: rescale the embeddings"),
    ):
        if n := int(bad.sum()):
            raise ValueError(f"{name}: {n} {what} (first: row {int(bad.int().argmax())})")
    return lengths.float()


def _check_vectors(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 2 or not x.numel():
        raise ValueError(f"{name} must be a non-empty (N, D) tensor of floats, got {_describe(x)}")


def _check_integers(name: str, x: Tensor, n: int) -> None:
    if not isinstance(x, Tensor) or x.dtype == torch.bool or x.is_floating_point() or x.shape != (n,):
        raise ValueError(f"{name} must be a tensor of {n} integers, one for each row, got {_describe(x)}")


def _describe(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
