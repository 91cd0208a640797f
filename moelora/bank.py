"""All experts of one site, stacked. Begin with ExpertBank; an expert that enters or leaves it is an Expert.

Frozen experts are buffers in the base model's dtype, trainable ones are parameters. In memory the frozen rows stand
first and the trainable ones behind them; ids are independent of that, so freezing an expert moves its rows and keeps
its id.

Experts may be heads of one A (HydraLoRA, arXiv 2404.19245): each has its own B, and the A is stored once.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from moelora.kernels.factors import Factors, index_tensors
from moelora.kernels.fused import PLAIN


class Expert(NamedTuple):
    """What one adapter contributes at one site: `scale * (x @ A_RD.T) @ B_RO`, plus `scale * bias_O`.

    An expert without rows (R = 0) stands for an adapter that has no LoRA at this site.
    """

    A_RD: Float[Tensor, "R D"]
    B_RO: Float[Tensor, "R O"]
    scale: float = 1.0
    bias_O: Float[Tensor, " O"] | None = None

    @property
    def rank(self) -> int:
        """Number of rank-one units."""
        return self.A_RD.shape[0]

    def delta_OD(self) -> Float[Tensor, "O D"]:
        """The weight change that this expert stands for, in fp64: for tests and reports, never for work."""
        return self.scale * einsum(self.B_RO.double(), self.A_RD.double(), "r o, r d -> o d")


def absent_expert(in_features: int, out_features: int) -> Expert:
    """The expert of an adapter that has no LoRA at a site."""
    return Expert(torch.zeros(0, in_features), torch.zeros(0, out_features))


def fresh_expert(
    in_features: int, out_features: int, rank: int, *, scale: float, generator: torch.Generator | None = None
) -> Expert:
    """A new expert that changes nothing until it is trained: A uniform as `nn.Linear` and PEFT start it, B zero."""
    bound = 1 / math.sqrt(in_features)
    A_RD = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return Expert(A_RD, torch.zeros(rank, out_features), scale)


class ExpertBank(nn.Module):
    """The experts of one site.

    Build it with `stack`; `split` gives the experts back, bit for bit.

    Attributes:
        ranks: rank of each expert; 0 where an adapter has no LoRA at this site.
        scales: trained scale of each expert.
        trainable: which experts are parameters.
        shared: which experts are heads of the one A; all of these are parameters, or none.
        layout: the same for two banks whose rows stand in the same places and belong to the same experts. It is text,
            which compiled code compares at once: for tuples it looks at each number.
    """

    in_features: int
    out_features: int
    frozen_dtype: torch.dtype
    trainable_dtype: torch.dtype
    layout: str
    scale_E: Tensor
    owner_R: Tensor
    rows_FP: Tensor
    fill_FP: Tensor
    owner_1R: Tensor
    scale_1E: Tensor
    starts_1E: Tensor
    ranks_1E: Tensor
    A_frozen_RD: Tensor
    B_frozen_RO: Tensor
    bias_frozen_EO: Tensor | None
    A_trainable_RD: nn.Parameter | None
    B_trainable_RO: nn.Parameter | None
    bias_trainable_EO: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, device: torch.device, stacking: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.frozen_dtype, self.trainable_dtype = dtype, torch.float32
        self.ranks: tuple[int, ...] = ()
        self.scales: tuple[float, ...] = ()
        self.trainable: tuple[bool, ...] = ()
        self.shared: tuple[bool, ...] = ()
        self.register_buffer("A_frozen_RD", torch.zeros(0, in_features, dtype=dtype, device=device))
        self.register_buffer("B_frozen_RO", torch.zeros(0, out_features, dtype=dtype, device=device))
        self.register_buffer("bias_frozen_EO", None)
        for name in ("A_trainable_RD", "B_trainable_RO", "bias_trainable_EO"):
            self.register_parameter(name, None)
        self._known: Factors | None = None
        self._known_of: Tensor | None = None  # the frozen A that it was made from
        if not stacking:
            self._index()

    # --- in and out -----------------------------------------------------------------------------------------------

    @classmethod
    def stack(
        cls,
        experts: Sequence[Expert],
        *,
        in_features: int,
        out_features: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        trainable: Iterable[int] = (),
        shared: Iterable[int] = (),
    ) -> "ExpertBank":
        """A bank of these experts, in this order.

        Args:
            experts: any ranks, also 0. Their tensors are copied, never kept.
            in_features, out_features: width of the site's input and output.
            dtype: of the frozen rows. Trainable rows are fp32.
            device: where the rows go.
            trainable: ids of the experts that are parameters.
            shared: ids of the experts that are heads of one A.

        Raises:
            ValueError: if an expert's shapes do not fit the site, or heads of one A differ in it.
        """
        bank = cls(in_features, out_features, dtype=dtype, device=torch.device(device), stacking=True)
        bank._fill(experts, frozenset(trainable), frozenset(shared))
        return bank

    def split(self) -> list[Expert]:
        """The experts, as views of the bank's rows; absent ones with rank 0."""
        return [self.expert(index) for index in range(len(self))]

    def expert(self, index: int) -> Expert:
        """One expert, as a view of the bank's rows."""
        begin, rank = self._starts_of_kind[index], self.ranks[index]
        begin_A, bias_O = self._starts_of_A[index], None
        if self.trainable[index]:
            assert self.A_trainable_RD is not None
            assert self.B_trainable_RO is not None
            A_RD, B_RO, biases = self.A_trainable_RD.detach(), self.B_trainable_RO.detach(), self.bias_trainable_EO
        else:
            A_RD, B_RO, biases = self.A_frozen_RD, self.B_frozen_RO, self.bias_frozen_EO
        if biases is not None and self._has_bias[index]:
            bias_O = biases.detach()[self._place_of_kind[index]]
        A_RD, B_RO = A_RD[begin_A : begin_A + rank], B_RO[begin : begin + rank]
        return Expert(A_RD, B_RO, self.scales[index], bias_O)

    def add(self, expert: Expert, *, trainable: bool = False, shared: bool = False) -> None:
        """Append one expert; its id is the highest. `shared`: as a head of the A that others share.

        Raises:
            ValueError: if it does not fit the site, or is no head of that A. The bank is as it was then.
        """
        kinds, heads = (*self.trainable, trainable), (*self.shared, shared)
        self._fill([*self.split(), expert], _where(kinds), _where(heads))

    def drop(self, index: int) -> None:
        """Remove one expert; those behind it move up by one id."""
        experts, kinds, heads = self.split(), list(self.trainable), list(self.shared)
        del experts[index], kinds[index], heads[index]
        self._fill(experts, _where(kinds), _where(heads))

    def set_trainable(self, ids: Iterable[int]) -> None:
        """Make exactly these experts parameters and all others buffers. Experts without rows stay as they are.

        Raises:
            ValueError: if only some of the heads of one A are among them. The bank is as it was then.
        """
        wanted = frozenset(index for index in ids if self.ranks[index])
        if wanted != _where(self.trainable):
            self._fill(self.split(), wanted, _where(self.shared))

    # --- what layers and kernels see ------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        """How many rows all experts have together."""
        return self._total_rank

    @property
    def present(self) -> tuple[bool, ...]:
        """Which experts have rows at this site."""
        return tuple(rank > 0 for rank in self.ranks)

    def factors(self) -> Factors:
        """The stacked experts as the kernels read them."""
        # a frozen bank answers each decoded token alike; the check is for those who swap its buffers for others
        known, buffers = self._known, self._buffers
        if known is not None and self._known_of is buffers["A_frozen_RD"] and known.B_RO is buffers["B_frozen_RO"]:
            return known
        factors = Factors(
            self._all_A_RD(),
            _join(self.B_frozen_RO, self.B_trainable_RO),
            self.scale_E,
            self.owner_R,
            self.rows_FP,
            self.fill_FP,
            self._biases_EO(),
            (self.owner_1R, self.scale_1E, self.starts_1E, self.ranks_1E),
            shared_A_PD=self._one_A_PD(),
        )
        if self.A_trainable_RD is None and factors.bias_EO is None:
            factors = self._known = factors._replace(
                slices=tuple((A_RD.T, B_RO, scale) for A_RD, B_RO, scale, _ in self.split())
            )
            self._known_of = self.A_frozen_RD
        return factors

    def extra_repr(self) -> str:
        trainable = sum(self.trainable)
        return (
            f"experts={len(self)}, ranks={self.ranks if len(self) <= 16 else (*self.ranks[:16], '...')}, "
            f"in_features={self.in_features}, out_features={self.out_features}, trainable={trainable}"
        )

    # --- inside ---------------------------------------------------------------------------------------------------

    def _fill(self, experts: Sequence[Expert], trainable: frozenset[int], shared: frozenset[int]) -> None:
        """Take these experts instead of those that are here."""
        for index, expert in enumerate(experts):
            _check(expert, index, self.in_features, self.out_features)
        _check_heads(experts, trainable, shared)
        device = self.A_frozen_RD.device
        frozen_ids = [index for index in range(len(experts)) if index not in trainable]
        trainable_ids = [index for index in range(len(experts)) if index in trainable]

        # the other heads bring their B only
        for index in sorted(shared)[1:]:
            experts = [*experts[:index], experts[index]._replace(A_RD=experts[index].A_RD[:0]), *experts[index + 1 :]]
        A_RD, B_RO, bias_EO = _stack([experts[index] for index in frozen_ids], self, self.frozen_dtype, device)
        self.A_frozen_RD, self.B_frozen_RO, self.bias_frozen_EO = A_RD, B_RO, bias_EO
        A_RD, B_RO, bias_EO = _stack([experts[index] for index in trainable_ids], self, self.trainable_dtype, device)
        self.A_trainable_RD = nn.Parameter(A_RD) if trainable_ids else None
        self.B_trainable_RO = nn.Parameter(B_RO) if trainable_ids else None
        self.bias_trainable_EO = None if bias_EO is None else nn.Parameter(bias_EO)

        self.ranks = tuple(expert.B_RO.shape[0] for expert in experts)
        self.scales = tuple(float(expert.scale) for expert in experts)
        self.trainable = tuple(index in trainable for index in range(len(experts)))
        self.shared = tuple(index in shared for index in range(len(experts)))
        self._has_bias = tuple(expert.bias_O is not None for expert in experts)
        self._index()

    def _index(self) -> None:
        """Work out where each expert's rows stand, and lay the index tensors of `Factors` out for that."""
        frozen_rows = sum(rank for rank, kind in zip(self.ranks, self.trainable, strict=True) if not kind)
        counts, places = {False: 0, True: 0}, {False: 0, True: 0}
        starts_of_kind, place_of_kind = [], []
        for rank, kind in zip(self.ranks, self.trainable, strict=True):
            starts_of_kind.append(counts[kind])
            place_of_kind.append(places[kind])
            counts[kind], places[kind] = counts[kind] + rank, places[kind] + 1
        self._starts_of_kind, self._place_of_kind = tuple(starts_of_kind), tuple(place_of_kind)
        self._starts_of_A = self._index_A()
        self._known = self._known_of = None
        self._total_rank = sum(self.ranks)
        self.layout = repr((self.ranks, self.scales, self.trainable))

        starts = tuple(
            start + (frozen_rows if kind else 0) for start, kind in zip(starts_of_kind, self.trainable, strict=True)
        )
        tensors = index_tensors(starts, self.ranks, self.scales, self.A_frozen_RD.device)
        names = ("scale_E", "owner_R", "rows_FP", "fill_FP", "owner_1R", "scale_1E", "starts_1E", "ranks_1E")
        for name, tensor in zip(names, tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        order = [index for kind in (False, True) for index, is_kind in enumerate(self.trainable) if is_kind is kind]
        self._bias_order = tuple(order.index(index) for index in range(len(self.ranks)))

    def _index_A(self) -> tuple[int, ...]:
        """Where each expert's rows of A begin among those of its kind; heads of one A begin at the same."""
        counts, starts, heads_begin = {False: 0, True: 0}, [], None
        for rank, kind, shared in zip(self.ranks, self.trainable, self.shared, strict=True):
            known = heads_begin if shared else None
            starts.append(counts[kind] if known is None else known)
            if known is None:
                counts[kind] += rank
            if shared:
                heads_begin = starts[-1]
        return tuple(starts)

    def _all_A_RD(self) -> Tensor:
        """The rows of A as the experts stand in memory, an A that is shared once for each of its heads."""
        if not any(self.shared):
            return _join(self.A_frozen_RD, self.A_trainable_RD)
        parts = {False: [self.A_frozen_RD[:0]], True: []}
        for begin, rank, kind in zip(self._starts_of_A, self.ranks, self.trainable, strict=True):
            rows_RD = self.A_trainable_RD if kind else self.A_frozen_RD
            assert rows_RD is not None
            parts[kind].append(rows_RD[begin : begin + rank])
        return _join(torch.cat(parts[False]), torch.cat(parts[True]) if parts[True] else None)

    def _one_A_PD(self) -> Tensor | None:
        """The A that all experts share; None if they do not."""
        if not self.shared or not all(self.shared):
            return None
        return self.A_frozen_RD if self.A_trainable_RD is None else self.A_trainable_RD

    def _biases_EO(self) -> Tensor | None:
        if self.bias_frozen_EO is None and self.bias_trainable_EO is None:
            return None
        kinds = ((self.bias_frozen_EO, False), (self.bias_trainable_EO, True))
        parts = [
            self.A_frozen_RD.new_zeros(self.trainable.count(kind), self.out_features) if part is None else part
            for part, kind in kinds
        ]
        return torch.cat(parts)[list(self._bias_order)]

    def _apply(self, fn: Any, recurse: bool = True) -> "ExpertBank":
        """`.to(...)` moves and casts the rows; the index is that of the new device, and its scales stay exact fp32."""
        super()._apply(fn, recurse)
        self.frozen_dtype, self._known, self._known_of = self.A_frozen_RD.dtype, None, None
        if type(self.A_frozen_RD) in PLAIN and not self.A_frozen_RD.is_meta:
            self._index()
        return self


def _join(frozen: Tensor, trainable: Tensor | None) -> Tensor:
    if trainable is None:
        return frozen
    return torch.cat([frozen.to(trainable.dtype), trainable]) if frozen.shape[0] else trainable


def _stack(
    experts: Sequence[Expert], bank: ExpertBank, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows of these experts in one tensor each."""
    A_RD = _concatenated([expert.A_RD for expert in experts], bank.in_features, dtype, device)
    B_RO = _concatenated([expert.B_RO for expert in experts], bank.out_features, dtype, device)
    if all(expert.bias_O is None for expert in experts):
        return A_RD, B_RO, None
    bias_EO = torch.zeros(len(experts), bank.out_features, dtype=dtype, device=device)
    for place, expert in enumerate(experts):
        if expert.bias_O is not None:
            bias_EO[place].copy_(expert.bias_O)
    return A_RD, B_RO, bias_EO


def _concatenated(parts: list[Tensor], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rows of all parts in one new tensor of this dtype, on this device."""
    if not parts:
        return torch.empty(0, width, dtype=dtype, device=device)
    return torch.cat([part.to(device=device, dtype=dtype) for part in parts])


def _where(flags: Iterable[bool]) -> frozenset[int]:
    """The ids of the experts for which this is so."""
    return frozenset(index for index, flag in enumerate(flags) if flag)


def _check_heads(experts: Sequence[Expert], trainable: frozenset[int], shared: frozenset[int]) -> None:
    if not shared:
        return
    if shared & trainable and not shared <= trainable:
        raise ValueError(
            f"the experts {sorted(shared)} share one A, so they are trained together or not at all; "
            f"got {sorted(shared & trainable)} to be trained"
        )
    first, *others = sorted(shared)
    A_RD = experts[first].A_RD
    for index in others:
        other_RD = experts[index].A_RD
        if other_RD.shape != A_RD.shape or not torch.equal(other_RD.to(A_RD), A_RD):
            raise ValueError(
                f"the experts {first} and {index} are to share one A, but theirs differ; "
                f"expected the same {tuple(A_RD.shape)} numbers, bit for bit"
            )


def _check(expert: Expert, index: int, in_features: int, out_features: int) -> None:
    expected = ((expert.rank, in_features), (expert.rank, out_features))
    came = (tuple(expert.A_RD.shape), tuple(expert.B_RO.shape))
    if came != expected:
        raise ValueError(f"expert {index} has the factors {came}; a site of this width expects {expected}")
    if expert.bias_O is not None and tuple(expert.bias_O.shape) != (out_features,):
        raise ValueError(f"expert {index} has a bias of shape {tuple(expert.bias_O.shape)}; expected ({out_features},)")
    if not math.isfinite(expert.scale):
        raise ValueError(f"expert {index} has the scale {expert.scale}; expected a finite number")
