"""The only definition of every setting of the pipeline: one frozen model per verb, plus the cluster's.

In: nothing. Out: pydantic models whose defaults, bounds and descriptions feed `--help`, the template printed by
`pipeline config` and the README's table. This module knows no other room; plug-ins (encoders, segmenters, MIL
models, back ends) define their own `Params` beside their code and receive them through the `*_params` mappings.

Every field enters the fingerprint of the outputs unless it is made by `speed(...)`: such fields change how fast a
result comes, never the result. Forgetting the mark costs a refusal, never a wrong reuse.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mhim.configs.base import Settings as Settings
from mhim.configs.base import added as added
from mhim.configs.base import apart, later, speed
from mhim.configs.base import before as before
from mhim.configs.base import changed as changed
from mhim.configs.base import fingerprint_fields as fingerprint_fields
from mhim.configs.base import marked as marked
from mhim.configs.outcomes import TaskName
from mhim.configs.schema_benchmark import BENCHMARK as BENCHMARK
from mhim.configs.schema_benchmark import BenchmarkConfig as BenchmarkConfig
from mhim.configs.schema_cluster import ClusterConfig as ClusterConfig
from mhim.configs.schema_maps import MapConfig as MapConfig
from mhim.configs.schema_tables import LabelsConfig as LabelsConfig
from mhim.configs.schema_tables import TablesConfig as TablesConfig
from mhim.configs.schema_tables import plain_names


class TileConfig(Settings):
    """Tissue segmentation and tiling (`pipeline tile`)."""

    mpp: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.5,),
        min_length=1,
        description="µm per tile pixel; several values give several magnifications on one aligned grid, the first is the main one",
    )
    tile_px: int = Field(256, ge=16, le=4096, description="tile edge in px at `mpp`")
    overlap_um: float = Field(0.0, ge=0, description="overlap of neighbouring tiles in µm")
    min_tissue: float = Field(0.3, ge=0, le=1, description="smallest fraction of a tile that must be tissue")
    segmenter: str = Field(
        "stain",
        min_length=1,
        description="tissue segmenter: a file name in extract/tissue/, or your own: my_module, ./mine.py or ./mine.py:object",
    )
    segmenter_params: dict[str, Any] = Field(default_factory=dict, description="settings of the segmenter itself")
    fallback_segmenter: str = Field(
        "otsu", description="segmenter tried when the first finds no tissue; empty for none"
    )
    segment_mpp: float = Field(8.0, gt=0, description="µm per px of the image on which tissue is segmented")
    smooth_um: float = Field(4.0, ge=0, description="smoothing of the image before the decision, µm")
    close_um: float = Field(16.0, ge=0, description="gaps in the tissue narrower than this are closed, µm")
    min_piece_um2: float = Field(20000.0, ge=0, description="pieces of tissue smaller than this are dropped, µm²")
    min_hole_um2: float = Field(10000.0, ge=0, description="holes in the tissue smaller than this are filled, µm²")
    mpp_of_slides: float | None = Field(
        None,
        gt=0,
        description="µm per px of level 0 for every slide, overriding the files (a manifest column `mpp` overrides this)",
    )
    assume_mpp_from_power: bool = Field(
        False, description="when nothing else tells the mpp, assume 10 / objective power"
    )
    regions_frame: Literal["auto", "bounds", "full"] = Field(
        "auto",
        description="corner from which drawn regions count: of the scanned bounds, or of the whole level 0; auto is as the program that writes such files does (QuPath GeoJSON bounds; ASAP, ImageScope and HALO XML full)",
    )
    blur_probe_um: float = Field(
        2000.0, ge=0, description="distance of the spots at which focus is measured, µm; 0 measures none"
    )
    max_upsample: float = Field(
        1.25, ge=1, description="refuse a slide whose level 0 would have to be enlarged by more than this"
    )
    max_pen: float = later(1.0, "drop tiles with a larger fraction of pen ink", ge=0, le=1)
    max_blur: float = later(1.0, "drop tiles with a larger fraction out of focus", ge=0, le=1)
    max_fold: float = later(1.0, "drop tiles with a larger fraction of dark folds", ge=0, le=1)
    max_haze: float = later(1.0, "drop tiles with a larger fraction of bubbles or haze", ge=0, le=1)
    save_tiles: Literal["none", "jpg", "png"] = Field("none", description="also write every tile as an image file")
    overlay: bool = Field(True, description="write an overlay JPEG per slide")

    @field_validator("mpp")
    @classmethod
    def _each_once(cls, mpp: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(mpp)) < len(mpp):
            raise ValueError("each µm per px once: the same tiles twice would count twice in every bag")
        return mpp


class ExtractConfig(Settings):
    """Feature extraction (`pipeline extract`)."""

    encoder: str = Field(
        "texture",
        description="encoder: a name listed by `pipeline encoders`, `timm:<model>`, or your own: my_module.function or ./mine.py:function",
    )
    encoder_params: dict[str, Any] = Field(default_factory=dict, description="settings of the encoder itself")
    dtype: Literal["float16", "float32"] = Field("float16", description="number type of the stored features")
    chunk_rows: int = Field(16384, ge=64, description="tiles per stored chunk (a chunk is one file)")
    compress: bool = Field(False, description="compress the chunks (saves 8-20 % of disk, reads several times slower)")
    allow_mismatch: bool = Field(False, description="use tiles of another mpp or size than the encoder was trained at")
    stain_norm: Literal["none", "reinhard", "macenko"] = Field(
        "none", description="stain normalisation before the encoder"
    )
    reader: Literal["auto", "openslide"] = Field(
        "auto", description="auto decodes tiled TIFF slides directly and uses OpenSlide for the rest"
    )
    reduction: Literal["area", "dct"] = Field(
        "area",
        description="how the direct reader halves the resolution: area average, or JPEG's own scaled decoding (faster, differs by 0.6 grey levels on average)",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="arithmetic of the encoder; auto is the encoder's own on a GPU and float32 on a CPU"
    )
    weights: str | None = speed(
        None, "file or folder with the encoder's weights (their SHA-256 enters the fingerprint, not the path)"
    )
    offline: bool = speed(False, "never open a network connection")
    gpu: bool = speed(False, "use the GPU; stops if there is none")
    gpus: tuple[int, ...] = speed((), "GPU numbers, one process each over one shared work list")
    batch: int = speed(128, "tiles per forward pass on a GPU (halved on out-of-memory)", ge=1)
    readers: int = speed(0, "reading threads; 0 is one per core", ge=0)
    queue_mb: int = speed(512, "most memory for tiles read ahead, MiB", ge=16)
    compile: bool = Field(False, description="torch.compile the encoder (can change the last bits of the features)")
    cache_dir: str | None = speed(None, "local folder where slides are staged ahead of use")
    cache_gb: float = speed(50.0, "size limit of `cache_dir`, GiB", gt=0)


class TrainConfig(Settings):
    """Training (`pipeline train`)."""

    model: str = Field(
        "mhim",
        description="MIL model: a file name in mil/models/, or your own: my_module, ./mine.py or ./mine.py:object",
    )
    model_params: dict[str, Any] = Field(default_factory=dict, description="settings of the model itself")
    task: TaskName = Field(
        "auto",
        description="classification, ordinal, regression, survival, multilabel (two classes in each of several columns), or the kind of each column: grade=ordinal,ki67=regression; auto: survival if the labels have time and event, classes if they are words or two values",
    )
    classes: tuple[str, ...] = Field(
        (),
        description="class names in order, the positive one last, or levels, the lowest first; empty: as in the labels, sorted",
    )
    levels: dict[str, tuple[str, ...]] = added(
        {}, "`classes` of each of several columns that need an order of their own: {grade: [low, high]}"
    )
    ordinal: Literal["corn", "cumulative"] = added(
        "cumulative", "how the logits of levels become probabilities: cumulative, or conditional (CORN)"
    )
    regression_loss: Literal["squared", "huber"] = added(
        "squared", "loss of numbers, in standard deviations of the training part; huber is robust to outliers"
    )
    survival_loss: Literal["nll", "cox"] = Field(
        "nll", description="discrete-time likelihood, or Cox partial likelihood over several bags"
    )
    survival_bins: int = Field(
        4,
        ge=2,
        le=64,
        description="time bins of the discrete likelihood, cut at quantiles of the training fold's events",
    )
    bag: Literal["patient", "slide"] = added(
        "patient",
        "one bag: all slides of a patient, or each slide with its own label (splits and intervals keep patients whole)",
    )
    folds: int = Field(5, ge=2, description="cross-validation folds")
    repeats: int = Field(1, ge=1, description="repetitions of the whole cross-validation with other splits")
    seeds: int = Field(1, ge=1, description="trainings per fold with other seeds")
    seed: int = Field(2021, ge=0, description="seed of splits and trainings")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of the training patients kept for model selection")
    split_by: Literal["auto", "patient", "site", "csv"] = Field(
        "auto",
        description="auto: the labels' split or fold column if present, else patients; site keeps each site in one fold",
    )
    protocol: Literal["honest", "paper"] = Field(
        "honest",
        description="paper selects on the test fold and bins over all patients, as the authors' program: its numbers are optimistic",
    )
    select: Literal["best", "last"] = Field("best", description="epoch that is kept: best on validation, or the last")
    epochs: int = Field(50, ge=1, description="most epochs")
    patience: int = Field(
        15, ge=0, description="epochs without gain on validation before stopping; 0 never stops early"
    )
    min_epochs: int = Field(10, ge=0, description="no early stopping before this epoch")
    lr: float = Field(2e-4, gt=0, description="learning rate")
    weight_decay: float = Field(1e-5, ge=0, description="weight decay")
    optimizer: Literal["adam", "adamw"] = Field("adam", description="optimiser")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning-rate schedule over `epochs`")
    warmup_epochs: int = Field(0, ge=0, description="linear warm-up")
    batch_bags: int = Field(1, ge=1, description="bags packed into one step")
    packed: bool = added(
        False,
        "encode the bags of a step as one row of instances with a softmax inside each (segments), where the model can (abmil, gated_abmil, mean, nnmil): the same numbers but for the order of sums (and nnmil's draws of dropout), faster for many small bags",
    )
    accumulate: int = Field(1, ge=1, description="steps whose gradients are added up before the optimiser moves")
    max_tiles: int = Field(0, ge=0, description="random cap on a training bag's tiles; 0: none; scoring uses all tiles")
    balance: Literal["none", "weights", "sampling"] = Field(
        "none", description="class imbalance: weighted loss or balanced sampling"
    )
    amp: bool = Field(False, description="bfloat16 autocast in training")
    fallback: float | None = Field(
        0.1,
        ge=0,
        description="MHIM gives way to the plain model of the fold when its training loss in inference mode is larger by more than this, or (select: best) validation prefers the plain one; null never",
    )
    choice: Literal["point", "margin", "inner"] = apart(
        "point",
        "evidence by which MHIM or the plain model of the fold is kept (with train.fallback): point, the better one on validation, ties to MHIM; margin, MHIM only if it is better by choice_margin standard errors; inner, as margin, but where validation is small by the patients that choice_folds inner folds hold out",
    )
    choice_margin: float = apart(1.0, "paired standard errors by which MHIM must be better to be kept", ge=0)
    choice_patients: int = apart(
        30, "validation patients of a fold below which choice=inner gathers evidence in inner folds", ge=0
    )
    choice_folds: int = apart(
        4,
        "inner folds of each training part for choice=inner, in each of which both models are trained once more",
        ge=2,
    )
    threads: int = Field(
        1,
        ge=1,
        description="CPU threads of one training (sums are split by thread, so it changes last bits; trainings themselves run in parallel)",
    )
    cox_bags: int = Field(
        64, ge=2, description="most recent training bags that a Cox risk set reaches over, besides those of the step"
    )
    grid: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="lists of model_params or settings to try, chosen on validation only"
    )
    draws: int = apart(
        0,
        "settings tried per fold, chosen on validation before any test patient is read: 0 none but those given; else these and so many less one drawn at random from the ranges that the model's file declares",
        ge=0,
    )
    pretrained: str = speed(
        "",
        "file with pretrained weights of FEATHER's layout from which train.model=feather starts, your own (their SHA-256 enters the fingerprint, not the path)",
    )
    pretrained_encoder: str = added(
        "",
        "encoder that these weights were trained on; it must be that of the features, since widths alone prove nothing",
    )
    attention_entropy: float = added(
        0.0,
        "weight of the attention's negative entropy in the loss of any attention model, MHIM's students too (AEM); it falls to 0 over the epochs by a half cosine",
        ge=0,
    )
    standardize: bool | Literal["auto"] = Field(
        False,
        description="standardise features with the training fold's mean and sd (kept in the model); auto decides by their size and spread, and tells it",
    )
    tables: dict[str, str] = speed(
        {}, "patients' tables, name -> file (their rows of the run's patients enter the fingerprint, not the path)"
    )
    fusion: Literal["none", "late", "gate", "coattn"] = apart(
        "none",
        "slides together with patients' tables (--table): late weighs the answers of models of each alone, gate learns weights of each patient's own, coattn adds a network in which groups of columns query the tiles",
    )
    fusion_params: dict[str, Any] = apart({}, "settings of the fusion that has some (coattn)")
    fusion_folds: int = apart(
        4, "inner folds of each training part, in which the modalities are weighed (so many more trainings)", ge=2
    )
    fusion_groups: tuple[str, ...] = apart((), "tables that enter as the means of their groups of columns")
    gpu: bool = speed(False, "use the GPU; stops if there is none")
    cache_gb: float = speed(8.0, "most memory for bags kept in RAM, GiB", ge=0)
    checkpoint_s: float = speed(
        60.0,
        "seconds after which the state is saved inside an epoch too (each epoch is a checkpoint anyway); 0 never does",
        ge=0,
    )
    log: Literal["csv", "tensorboard", "wandb", "mlflow"] = speed("csv", "experiment log besides the CSV")

    @field_validator("tables")
    @classmethod
    def _plain_names(cls, tables: dict[str, str]) -> dict[str, str]:
        return plain_names(tables)

    @model_validator(mode="after")
    def _no_contradiction(self) -> TrainConfig:
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs}) must be less than epochs ({self.epochs})")
        if self.task == "survival" and self.balance == "weights":
            raise ValueError(
                "balance=weights is of classes; for survival use balance=sampling (seen events and censored) or none"
            )
        if self.split_by == "csv" and self.repeats > 1:
            raise ValueError("split_by=csv gives one split, so repeats must be 1 (use seeds for more trainings)")
        if self.choice == "inner" and self.fusion != "none":
            raise ValueError("choice=inner goes with no fusion: set choice=margin, or point")
        if self.choice != "point" and self.protocol == "paper":
            raise ValueError(f"choice={self.choice} needs validation patients, which protocol=paper does not have")
        if self.draws and (self.grid or self.protocol == "paper"):
            raise ValueError("draws goes with no grid, and not with protocol=paper, which selects on the test fold")
        plan = sorted(
            {"grid", "draws", "seeds", "seed", "folds", "repeats", "split_by", "protocol", "bag"} & self.grid.keys()
        )
        if plan:
            raise ValueError(f"grid: {plan[0]} decides which trainings there are and cannot be a value to try")
        empty = sorted(k for k, values in self.grid.items() if not values)
        if empty:
            raise ValueError(f"grid: {empty[0]} has no value to try")
        return self


class ScoreConfig(Settings):
    """Scoring (`pipeline score`)."""

    bootstrap: int = Field(1000, ge=0, description="bootstrap samples (by patient) for the intervals")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="level of the intervals")
    heatmaps: Literal["none", "attention", "probability", "contribution", "all"] = Field(
        "attention", description="heatmaps to draw"
    )
    heatmap_scale: Literal["percentile", "raw"] = Field("percentile", description="colour scale of the heatmaps")
    palette: Literal["auto", "even", "classic", "viridis", "cividis", "inferno", "coolwarm"] = added(
        "auto",
        "colours of the heatmaps: even is viridis, and coolwarm for maps of for and against; viridis, cividis and inferno "
        "are perceptually even and safe for the colour-blind, coolwarm is pale in the middle, classic is uneven; auto: "
        "even, but classic where the run's pictures were drawn before there was a choice",
    )
    heatmap_limit: int = Field(0, ge=0, description="draw at most so many slides; 0 is all")
    top_tiles: int = Field(
        0, ge=0, description="contact sheet of so many highest and lowest tiles per slide; 0 is none"
    )
    evidence: Literal["none", "attention", "all"] = Field(
        "none",
        description="test whether the maps say what the model uses, by keeping and removing their highest tiles: of "
        "attention, or of all maps",
    )
    geojson: bool = Field(False, description="also write the tiles with their scores as QuPath GeoJSON")
    tiff: bool = Field(False, description="also write the heatmap as a pyramidal TIFF registered to the slide")
    sensitivity: float | None = Field(
        None,
        gt=0,
        le=1,
        description="operating point by wished-for sensitivity instead of Youden's J; with specificity: undecided between the two",
    )
    specificity: float | None = Field(None, gt=0, le=1, description="operating point by wished-for specificity")
    abstain: float = Field(
        0.0, ge=0, lt=1, description="share of validation patients that may be left undecided around the threshold"
    )
    calibrate: bool = Field(True, description="temperature scaling fitted on validation")
    several_slides: Literal["bag", "mean", "max"] = Field(
        "bag",
        description="a new patient's slides: one bag, as in training; or each alone, then their mean, or the most positive",
    )
    allow_known: bool = Field(
        False,
        description="score patients and slides that the run was trained on as if they were new (noted in every output)",
    )

    @model_validator(mode="after")
    def _one_band(self) -> ScoreConfig:
        if self.sensitivity is not None and self.specificity is not None and self.abstain:
            raise ValueError(
                "score.sensitivity and score.specificity together leave undecided what lies between their "
                "thresholds; score.abstain is another way to say how much: set it to 0"
            )
        return self


class Config(Settings):
    """Every setting of the pipeline."""

    labels: LabelsConfig = LabelsConfig()
    tables: TablesConfig = TablesConfig()
    tile: TileConfig = TileConfig()
    extract: ExtractConfig = ExtractConfig()
    train: TrainConfig = TrainConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    score: ScoreConfig = ScoreConfig()
    map: MapConfig = MapConfig()
    cluster: ClusterConfig = ClusterConfig()
