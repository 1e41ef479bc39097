"""Nothing runs, leaks, hangs or is lost by a folder from somebody else: every kind of the corpus with its commands.

The gate has one or two kinds of each family; `pytest -m slow` the others, and every command on every kind.
"""

from __future__ import annotations

import os

import pytest

from clipkit.files import write_text
from tests.hostile.commands import COMMANDS, answer
from tests.hostile.make_corpus import KINDS

AIMED = [(name, command) for name, kind in KINDS.items() for command in kind.aims]
GATE = {
    "evaluate": """
        shards_command shards_command_in_braces shards_command_made_by_braces shards_address shards_absolute
        shards_by_dots shards_of_home shards_hidden shards_zero shards_of_very_many shards_many_by_product
        classes_outside templates_outside images_outside tasks_a_list task_with_odd_values data_link_out shards_fifo
        shards_command_as_a_files_name cifar_that_runs task_name_that_leaves evaluations_link_out
        shard_of_links_and_devices shard_of_labels_beyond_the_classes
    """,
    "report": """
        data_link_beside record_of_aliases metrics_of_a_million_names config_is_a_fifo config_link_out texts_as_tags
        addresses_with_tokens shards_command
    """,
    "predict": """
        tokenizer_nested tokenizer_of_great_length tokenizer_merges_outside tokenizer_fifo tokenizer_link_out
        width_of_a_billion layers_ten_million image_size_of_a_million heads_zero tower_of_a_hub tower_of_a_local_folder
        text_tower_of_a_folder text_tower_of_great_size config_nested weights_header_that_lies weights_cut_short
        weights_of_50_gb manifest_a_fifo
    """,
    "export": "export_link_out manifest_nested manifest_naming_what_is_above manifest_naming_zero manifest_of_too_few_files",
    "table": "folders_in_a_circle",
    "resume": "state_that_runs records_link_out",
}
GUARDED = {(name, command) for command, names in GATE.items() for name in names.split()}


def test_a_file_is_written_through_nothing_that_lies_in_its_folder(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "evaluations"
    kept.write_text("mine")
    folder.mkdir()
    for make_obstacle in (lambda path: path.symlink_to(kept), os.mkfifo):
        make_obstacle(folder / f".x.json.{os.getpid()}")
        (folder / "x.json").unlink(missing_ok=True)
        (folder / "x.json").symlink_to(kept)
        write_text(folder / "x.json", "new")
        assert kept.read_text() == "mine" and (folder / "x.json").read_text() == "new"
        assert not (folder / "x.json").is_symlink() and len(list(folder.iterdir())) == 1


def test_the_corpus_has_the_kinds_that_it_should():
    assert len(KINDS) >= 40 and {command for _, command in AIMED} == set(COMMANDS)
    assert {*GUARDED} <= {*AIMED} and len({name for name, _ in GUARDED}) >= 40


@pytest.mark.parametrize(
    ("name", "command"),
    [pytest.param(*one, marks=() if one in GUARDED else pytest.mark.slow) for one in AIMED],
)
def test_a_hostile_folder_is_answered(corpus, name, command):
    found = answer(corpus(name), name, command)
    assert not found.faults, f"{found.faults}\n{found.taken}\n{found.output}"
