"""Every file in `conf/` composes, and what a user adds joins in."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from qpo_sim.config import conf_folder, load, to_config
from qpo_sim.config.compose import compose
from qpo_sim.errors import InputError

CONF = conf_folder()
GROUPS = [folder.name for folder in sorted(CONF.iterdir()) if folder.is_dir() and folder.name not in ("hydra", "venue")]
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    extra = ["data.path=prices.csv"] if (group, option) == ("data", "file") else []
    load([f"{'+' if group == 'experiment' else ''}{group}={option}", *extra])


def test_every_venue_is_found_by_its_file():
    names = {file.stem for file in (CONF / "venue").glob("*.yaml")}
    assert names >= {"binance", "aave_v3"}
    venues = load().venue
    assert set(venues) == names
    assert all(venue["source"] and venue["as_of"] for venue in venues.values())


def test_every_option_can_be_set_without_a_plus():
    """A field that the shipped files do not spell out could not be overridden on the command line."""

    def missing(node, composed, prefix=""):
        for item in fields(node):
            key = f"{prefix}{item.name}"
            if item.name not in composed:
                yield key
            elif is_dataclass(getattr(node, item.name)):
                yield from missing(getattr(node, item.name), composed[item.name], f"{key}.")

    composed = compose()
    assert list(missing(to_config(composed), composed)) == []


def test_overrides_reach_their_field():
    config = load(
        [
            "simulation.n_paths=1e5",
            "market=gbm",
            "optimizer=sortino",
            "risk.levels=[0.9]",
            "risk.limits=[]",
            "book.perpetuals.0.positions.BTC=0.2",
            "venue.binance.funding.rate_per_8h=-0.0002",
            "+book.spot.SOL=0",
            "data.assets=null",
            "compute.devices=2",
        ]
    )
    assert config.simulation.n_paths == 100_000
    assert config.market.kind == "gbm"
    assert config.optimizer.objective == "sortino"
    assert config.risk.levels == (0.9,)
    assert config.book.perpetuals[0].positions["BTC"] == 0.2
    assert config.venue["binance"]["funding"]["rate_per_8h"] == -0.0002
    assert config.book.spot["SOL"] == 0.0
    assert config.compute.devices == 2


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    for folder in ("venue", "book"):
        (tmp_path / folder).mkdir()
    (tmp_path / "venue" / "mine_venue.yaml").write_text(
        "kind: tiered_margin\ntiers: {default: [[0, 0.01, 20]]}\nliquidation_fee_rate: 0.01\n"
        "funding: {rate_per_8h: 0.0001}\nsource: mine\nas_of: 2026\n"
    )
    (tmp_path / "book" / "mine.yaml").write_text(
        "capital: 1000\nperpetuals: [{name: a, mode: cross, venue: mine_venue, margin: 0.5, positions: {BTC: 1}}]\n"
    )
    return tmp_path


def test_users_venue_and_book_are_one_file_each(mine):
    config = load(["book=mine", "venue.mine_venue.liquidation_fee_rate=0.02"], config_dir=mine)
    assert config.book.perpetuals[0].venue == "mine_venue"
    assert config.venue["mine_venue"]["liquidation_fee_rate"] == 0.02
    # The next composition without that folder does not remember it.
    assert "mine_venue" not in load().venue


def test_users_root_file(mine):
    (mine / "root.yaml").write_text("defaults: [config, override book: mine, _self_]\nseed: 5\n")
    config = load(config_dir=mine, config_name="root")
    assert (config.seed, config.book.capital) == (5, 1000.0)


def test_typo_in_a_users_file(mine):
    (mine / "venue" / "mine_venue.yaml").write_text("kind: tiered_margin\ntierz: {}\n")
    with pytest.raises(InputError, match=r"venue\.mine_venue\.tierz is not an option: did you mean 'tiers'\?"):
        load(config_dir=mine)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("simulation.n_pathz=5", "simulation.n_pathz is not an option: did you mean 'simulation.n_paths'?"),
        ("n_paths=5", "n_paths is not an option: did you mean 'simulation.n_paths' or 'optimizer.n_paths'?"),
        ("+simulation.n_path=5", "simulation.n_path is not an option: did you mean 'n_paths'?"),
        ("+foo=1", "foo is not an option"),
        ("markt=gbm", "markt is not an option: did you mean 'market'?"),
        ("market=gmb", "market=gmb is not there to choose: did you mean 'gbm'?"),
        ("+experiment=gbm_controll", "did you mean 'gbm_control'?"),
        ("experiment=gbm_control", "write +experiment=... to add it"),
        ("+market=gbm", "market is chosen twice"),
        ("+seed=1", "seed is there already: write seed=... without the +"),
        ("book.spot.SOL=0.1", "write +book.spot.SOL=... to add it"),
        ("~marke", "did you mean 'market'?"),
        ("simulation=9", "must be a string"),
        ("foo", "'foo' cannot be read: write option=value"),
        ("risk.levels=[0.9", "cannot be read"),
        ("data=file", "data.path is missing"),
        ("seed=${nope}", "seed cannot be read: Interpolation key 'nope' not found"),
        ("seed=null", "seed is null: it must be a whole number"),
    ],
)
def test_command_line_mistakes_in_one_sentence(override, words):
    with pytest.raises(InputError) as refused:
        load([override])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
