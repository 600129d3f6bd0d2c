"""The library: a work folder, its slides and patients, its trained runs, as Python objects.

    from mhim.pipeline import Work

    work = Work("work")                                         # a folder that the command line filled, or a new one
    features = work.slide("a.svs").features()                   # numpy, mapped from the disk: (tiles, width)
    run = work.train(bags, labels, model="abmil")               # {name: array}, {name: class}
    answers = work.run("abmil").predict({"new": array})         # probabilities, decision, how unlike the training
    picture = work.run("abmil").heatmap("a.svs")                # uint8 RGB

Everything here is done by the code of the command line, so the same inputs give the same bytes and the same numbers.
Wrong use raises a subclass of `mhim.configs.errors.UserError`, whose message says what to do.

**Stable** (kept, or deprecated for two minor versions before it changes): `mhim.pipeline.Work`; the public attributes
and methods, with their parameters, of the classes that it returns (`Slide`, `Patient`, `Run`, `Prediction`,
`TileScores`, `Map`) and of `Bag`, all importable from `mhim.pipeline.api`; the contracts of plug-ins
(`mhim.extract.encoders.Encoder`, `mhim.mil.models.MIL` with `Bag`, `Instances`, `Encoded`, and what a segmenter and a
back end offer); the layout of the work folder; `mhim.configs.errors.UserError`. **Not stable**: every other module, and
all names that begin with `_`. Classes may get more attributes, and methods more optional parameters, at any time.
"""

from mhim.pipeline.api.bags import Bag as Bag
from mhim.pipeline.api.maps import Map as Map
from mhim.pipeline.api.run import Prediction as Prediction
from mhim.pipeline.api.run import Run as Run
from mhim.pipeline.api.run import TileScores as TileScores
from mhim.pipeline.api.slide import Patient as Patient
from mhim.pipeline.api.slide import Slide as Slide
from mhim.pipeline.api.work import Work as Work

__all__ = ["Bag", "Map", "Patient", "Prediction", "Run", "Slide", "TileScores", "Work"]
