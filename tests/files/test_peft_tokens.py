"""Rows of tokens alone: PEFT's TrainableTokens, read strictly and written the same way every time."""

import json

import pytest
import torch
from torch import Tensor

from veneer.adapter import Adapter, AdapterMetadata, LowRank, TokenRows
from veneer.config import LoRAConfig
from veneer.errors import AdapterError, DamagedArtefactError
from veneer.files.peft import adapter_from_files, adapter_to_files, load_adapter, save_adapter
from veneer.files.peft_folder import CONFIG, PREFIX, TENSORS
from veneer.files.strict_json import dump_json
from veneer.files.tensors import dump_tensors

ROWS = torch.arange(6.0).view(2, 3)
KEY = f"{PREFIX}model.embed.trainable_tokens_delta"
HEAD = f"{PREFIX}lm_head.trainable_tokens_delta"
RAW = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["embed"], "token_indices": [7, 5], "init_weights": True}


def files(tensors: dict[str, Tensor] | None = None, **changes: object) -> dict[str, bytes]:
    return {
        CONFIG: dump_json({**RAW, **changes}),
        TENSORS: dump_tensors({key: one.clone() for key, one in (tensors or {KEY: ROWS}).items()}),
    }


def refused(tensors: dict[str, Tensor] | None = None, **changes: object) -> str:
    with pytest.raises(AdapterError) as error:
        adapter_from_files(files(tensors, **changes), "a")
    return str(error.value)


def alone(**tables: TokenRows) -> Adapter:
    asked = {path: one.indices for path, one in tables.items()}
    config = LoRAConfig(target_modules=(), token_rows=asked)
    return Adapter({}, config, {}, AdapterMetadata(base="b", revision="r", row_format="chat"), tables)


def test_what_is_written_is_read_the_same(tmp_path):
    adapter = alone(embed=TokenRows((7, 5), ROWS), other=TokenRows((7, 5), -ROWS))
    save_adapter(adapter, tmp_path / "a")
    again = load_adapter(tmp_path / "a")
    assert (again.digest, again.config, again.metadata) == (adapter.digest, adapter.config, adapter.metadata)
    raw = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (raw["peft_type"], raw["target_modules"], raw["token_indices"]) == (
        "TRAINABLE_TOKENS",
        ["embed", "other"],
        [7, 5],
    )
    assert "r" not in raw
    with pytest.raises(DamagedArtefactError, match="expected digest 0"):
        adapter_from_files(adapter_to_files(adapter), "a", {"digest": "0"})


def test_a_file_says_its_table_by_a_list_by_a_path_or_by_being_alone():
    for targets in (["embed"], ["model.embed"], "model.embed", r".*\.embed"):
        adapter = adapter_from_files(files(target_modules=targets), "a")
        assert adapter.tokens["model.embed"].indices == (7, 5)
        assert torch.equal(adapter.tokens["model.embed"].rows, ROWS)
        assert adapter.config.target_modules == ()
    assert adapter.config.token_rows == {"model.embed": (7, 5)}


def test_a_tied_head_is_a_copy_and_no_table_of_its_own():
    adapter = adapter_from_files(files({KEY: ROWS, HEAD: ROWS}), "a")
    assert list(adapter.tokens) == ["model.embed"]
    assert "lm_head.trainable_tokens_delta': target_modules names no such table, and it is no copy" in refused(
        {KEY: ROWS, HEAD: -ROWS}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 4}, "r: a value here has no meaning that is known"),
        ({"token_index": [1]}, "token_index: a value here has no meaning that is known; nearest: 'token_indices'"),
        ({"token_indices": []}, "token_indices: expected token ids, each once"),
        ({"token_indices": [5, 5]}, "token_indices: expected token ids, each once"),
        ({"token_indices": [-1, 5]}, "token_indices: expected token ids from 0"),
        ({"token_indices": [5]}, "1 token ids and rows of shape (2, 3) disagree"),
        ({"target_modules": None}, "target_modules: expected the tables, got none"),
        ({"target_modules": ["embed", "other"]}, "target_modules='other': no rows of such a table are there"),
        ({"init_weights": "no"}, "init_weights: expected one of True, False"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, said):
    assert said in refused(**changes)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"embed.trainable_tokens_delta": ROWS}, "expected keys that begin with 'base_model.model.'"),
        ({KEY: ROWS, f"{PREFIX}q.lora_A.weight": ROWS, f"{PREFIX}q.lora_B.weight": ROWS.T}, "no rows of tokens, and"),
        ({KEY: ROWS, f"{PREFIX}head.weight": ROWS}, "no rows of tokens, and TRAINABLE_TOKENS has nothing else"),
        ({KEY: ROWS, f"{PREFIX}model.lm_head.weight": ROWS}, "no rows of tokens, and"),
        ({KEY: ROWS[0]}, "2 token ids and rows of shape (3,) disagree"),
        ({f"{PREFIX}model.embed.token_adapter.trainable_tokens_delta": ROWS}, "no rows of such a table are there"),
    ],
)
def test_other_tensors_are_refused(tensors, said):
    assert said in refused(tensors)


def test_an_expression_for_several_tables_is_refused_and_never_run():
    other = f"{PREFIX}model.other.trainable_tokens_delta"
    assert "an expression for several tables; expected a list of their names" in refused(
        {KEY: ROWS, other: ROWS}, target_modules="(x+x+)+y|.*"
    )


def test_what_peft_has_no_place_for_is_refused():
    adapter = Adapter(
        {},
        LoRAConfig(target_modules=["q"], token_rows={"embed": (1, 2), "other": (3, 4)}),
        tokens={"embed": TokenRows((1, 2), ROWS), "other": TokenRows((3, 4), ROWS)},
    )
    with pytest.raises(AdapterError, match="one list of tokens for all tables; these differ"):
        adapter_to_files(adapter)
    config = LoRAConfig(target_modules=["q"], modules_to_save=["head"], token_rows={"embed": (1, 2)})
    adapter = Adapter({}, config, {"head.weight": ROWS}, tokens={"embed": TokenRows((1, 2), ROWS)})
    with pytest.raises(AdapterError, match="got only parameters that trained whole and rows of tokens"):
        adapter_to_files(adapter)


def test_rows_beside_factors_stay_lora():
    pair = LowRank(torch.ones(2, 3), torch.ones(3, 2), 2.0)
    config = LoRAConfig(rank=2, alpha=4, target_modules=["q"], token_rows={"embed": (1, 2)})
    adapter = Adapter({"q": pair}, config, tokens={"embed": TokenRows((1, 2), ROWS)})
    written = adapter_to_files(adapter)
    assert json.loads(written[CONFIG])["peft_type"] == "LORA"
    assert adapter_from_files(written, "a").digest == adapter.digest
