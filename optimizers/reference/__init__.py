"""Each rule again, for one matrix in fp64 and as plain as its paper: the text to read first, and the tests' oracle.

Nothing here is batched, sharded or fast, and nothing here is imported by the rules in `optimizers.rules`; the two are
written independently and tests hold them against each other. numpy only.
"""

from optimizers.reference.adamuon import AdaMuon
from optimizers.reference.adamw import AdamW
from optimizers.reference.dion2 import Dion2
from optimizers.reference.galore import GaLore
from optimizers.reference.lion import Lion
from optimizers.reference.low_rank import Apollo, DctSubspace, Fira, Gum, LDAdam, SubTrack
from optimizers.reference.muon import Muon
from optimizers.reference.normuon import NorMuon
from optimizers.reference.soap import Soap
from optimizers.reference.sumo import Sumo

__all__ = [
    "AdaMuon",
    "AdamW",
    "Apollo",
    "DctSubspace",
    "Dion2",
    "Fira",
    "GaLore",
    "Gum",
    "LDAdam",
    "Lion",
    "Muon",
    "NorMuon",
    "Soap",
    "SubTrack",
    "Sumo",
]
