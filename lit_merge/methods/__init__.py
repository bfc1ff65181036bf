"""Merging methods, one a file."""

from lit_merge.methods.adamerging import AdaMerging
from lit_merge.methods.awm import AWM
from lit_merge.methods.breadcrumbs import Breadcrumbs
from lit_merge.methods.concrete import ConcreteMerging
from lit_merge.methods.consensus import Consensus
from lit_merge.methods.dam import DAM
from lit_merge.methods.dare import Dare
from lit_merge.methods.della import Della
from lit_merge.methods.doge import Doge
from lit_merge.methods.dop import Dop
from lit_merge.methods.emr import Emr
from lit_merge.methods.fisher_merging import FisherMerging
from lit_merge.methods.iso_c import IsoC
from lit_merge.methods.iso_cts import IsoCts
from lit_merge.methods.karcher_mean import KarcherMean
from lit_merge.methods.knots import Knots
from lit_merge.methods.last_k import LastK
from lit_merge.methods.lines import Lines
from lit_merge.methods.magmax import MagMax
from lit_merge.methods.model_stock import ModelStock
from lit_merge.methods.nuslerp import NuSlerp
from lit_merge.methods.opcm import Opcm
from lit_merge.methods.pcb import Pcb
from lit_merge.methods.regmean import RegMean
from lit_merge.methods.regmean_plus_plus import RegMeanPlusPlus
from lit_merge.methods.sau import SAU
from lit_merge.methods.sce import Sce
from lit_merge.methods.simple_average import SimpleAverage
from lit_merge.methods.singular_adamerging import SingularAdaMerging
from lit_merge.methods.slerp import Slerp
from lit_merge.methods.svc import Svc
from lit_merge.methods.tall_masks import TallMasks
from lit_merge.methods.task_arithmetic import TaskArithmetic
from lit_merge.methods.ties import Ties
from lit_merge.methods.tsv_compress import TsvCompress
from lit_merge.methods.tsv_merge import TsvMerge
from lit_merge.methods.weighted_average import WeightedAverage
from lit_merge.methods.wudi import Wudi

__all__ = (
    "AWM",
    "DAM",
    "SAU",
    "AdaMerging",
    "Breadcrumbs",
    "ConcreteMerging",
    "Consensus",
    "Dare",
    "Della",
    "Doge",
    "Dop",
    "Emr",
    "FisherMerging",
    "IsoC",
    "IsoCts",
    "KarcherMean",
    "Knots",
    "LastK",
    "Lines",
    "MagMax",
    "ModelStock",
    "NuSlerp",
    "Opcm",
    "Pcb",
    "RegMean",
    "RegMeanPlusPlus",
    "Sce",
    "SimpleAverage",
    "SingularAdaMerging",
    "Slerp",
    "Svc",
    "TallMasks",
    "TaskArithmetic",
    "Ties",
    "TsvCompress",
    "TsvMerge",
    "WeightedAverage",
    "Wudi",
)
