"""What docs/reliability.md promises, which tests prove it and how many cases they try.

`python tests/reliability/promises.py` writes the page; `test_reliability.py` checks that it is up to date.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# As pytest's `pythonpath` does, so that this file can be run by itself.
sys.path += [str(path) for path in (Path(__file__).parents[1], *Path(__file__).parents[1].iterdir()) if path.is_dir()]

import test_checkpoint
import test_cli
import test_codecs
import test_config
import test_curves
import test_damage
import test_divergence
import test_failures
import test_faults
import test_files
import test_fuzz
import test_inquiry
import test_long_run
import test_message
import test_notebook_failures
import test_observe
import test_own
import test_own_model
import test_plain_model
import test_profiles
import test_rename_records
import test_resume
import test_round
import test_run
import test_setup
import test_store
import test_together
import test_transport

from feddip_lite.records.store import ROOT

PAGE = ROOT / "docs" / "reliability.md"


@dataclass(frozen=True)
class Promise:
    """`proofs` maps each test to the number of cases that it tries for every set of its parameters."""

    text: str
    proofs: Mapping[Callable, int]


def one(*tests: Callable) -> dict[Callable, int]:
    """Tests that try one case for every set of their parameters."""
    return dict.fromkeys(tests, 1)


PROMISES = {
    "A run of hours is not lost": [
        Promise(
            "A run killed with `kill -9` in local training, in a merge, in an evaluation, at any step of writing a "
            "checkpoint or a result, or at any other moment goes on to the history, the weights and the memories, "
            "bit "
            "for bit, of the run that nobody killed. With `checkpoint_every=1` one round is lost at most.",
            one(
                test_resume.test_killed_run_goes_on_to_the_same_bits_and_loses_one_round_at_most,
                test_resume.test_many_killed_runs_go_on_to_the_same_bits,
                test_checkpoint.test_interrupted_run_resumes_to_the_same_bits,
            ),
        ),
        Promise(
            "So does a sweep; runs that were complete are left alone.",
            one(test_resume.test_killed_sweep_goes_on_and_leaves_complete_runs_alone),
        ),
        Promise(
            "So does a run in a notebook under papermill.",
            one(test_notebook_failures.test_notebook_killed_in_the_middle_of_a_run_goes_on_from_its_checkpoint),
        ),
        Promise(
            "Whatever fails at any open, write, flush, fsync or rename of a checkpoint, by an error or by `kill -9`: "
            "the old checkpoint or the new one is there, whole; what a killed process left is cleared by the next.",
            one(test_faults.test_checkpoint_is_the_old_one_or_the_new_one_at_every_step),
        ),
        Promise(
            "A result is complete or not there, whatever step of writing it fails.",
            one(test_faults.test_result_is_complete_or_not_there_at_every_step),
        ),
        Promise(
            "On a full disk, in a folder without rights, or where files cannot grow, the previous checkpoint "
            "stays, one "
            "line names the file, and the exit status is 1. The same command goes on when there is room.",
            {
                test_faults.test_full_disk_stops_the_run_with_one_line_and_the_same_command_goes_on: 3,
                test_faults.test_files_that_cannot_grow_and_folders_without_rights_stop_the_run_with_one_line: 1,
            },
        ),
        Promise(
            "2000 rounds need no more memory (5 %) and no more time at their end than at their start.",
            one(
                test_long_run.test_memory_does_not_grow_with_the_rounds,
                test_long_run.test_two_thousand_rounds_need_no_more_memory_and_no_more_time_at_their_end,
            ),
        ),
    ],
    "Damage is never read as if it were good": [
        Promise(
            f"A checkpoint, a result (either file) or a raw Fashion-MNIST file that is empty, cut at "
            f"{test_damage.CUTS} "
            f"places or has one of {test_damage.FLIPS} bits flipped is refused in one line that names the file.",
            {
                test_damage.test_damaged_checkpoint_is_refused: test_damage.DAMAGES,
                test_damage.test_damaged_result_is_refused: 2 * test_damage.DAMAGES,
                test_damage.test_damaged_idx_file_is_refused: test_damage.DAMAGES,
            },
        ),
        Promise(
            "So is an npz file, unless the bit lies where it changes nothing of the contents (a date, say).",
            {test_damage.test_damaged_npz_file_is_refused_or_its_contents_are_whole: test_damage.DAMAGES},
        ),
        Promise(
            "A checkpoint of another configuration, model or version, or of another program, is refused with the "
            "reason.",
            one(
                test_damage.test_checkpoint_of_another_configuration_is_refused_naming_what_differs,
                test_damage.test_checkpoint_that_is_not_ours_is_refused_and_nothing_in_it_is_run,
            ),
        ),
        Promise(
            "No pickle is ever run, not in a checkpoint, a result or a data file, but CIFAR's own files once each has "
            "the published MD5.",
            {
                test_files.test_torchvisions_cifar_folder_is_read_if_every_file_has_its_published_md5: 1,
                test_damage.test_checkpoint_that_is_not_ours_is_refused_and_nothing_in_it_is_run: 1,
                test_damage.test_result_that_is_a_pickle_is_refused_and_not_run: 1,
                test_damage.test_pickle_in_a_data_file_is_not_run: 1,
            },
        ),
        Promise(
            "A changed default never makes a stored result pass for the run of today: it is refused with its right id.",
            {
                test_rename_records.test_the_id_of_every_record_follows_from_its_configuration: 1,
                test_rename_records.test_a_record_from_before_a_changed_default_is_never_taken_for_the_new_run: 1,
                test_rename_records.test_renaming_moves_a_record_whole_and_a_second_call_changes_nothing: 1,
            },
        ),
        Promise(
            "A result that was edited by hand, renamed or paired with another table is refused. (Records written "
            "before "
            "they carried a checksum of their own are protected in their table only.)",
            {
                test_damage.test_edited_record_is_refused: 1,
                test_store.test_tampered_csv_is_refused_naming_the_file: 5,
                test_store.test_renamed_result_is_refused: 1,
            },
        ),
        Promise(
            "Malformed data (short, of another type, shape or range, NaN, HTML, members outside the folder, "
            "decompression bombs, wrong checksums, ...) is refused in one line.",
            {
                test_files.test_npz_with_malformed_arrays_is_refused: 1,
                test_files.test_malformed_idx_file_is_refused: 1,
                test_files.test_file_that_is_no_npz_is_refused: 1,
                test_files.test_sidecar_that_does_not_match_is_refused: 1,
                test_files.test_npz_that_unpacks_to_a_bomb_is_refused_before_it_does: 1,
                test_files.test_array_header_that_announces_an_absurd_size_is_refused: 1,
                test_files.test_npz_with_an_array_twice_is_refused: 1,
                test_files.test_npz_without_one_of_the_arrays_is_refused: 1,
                test_damage.test_hostile_archive_is_refused_and_leaves_no_trace: 1,
                test_damage.test_data_set_of_another_name_is_refused: 1,
            },
        ),
    ],
    "A bad client does not spoil the model": [
        Promise(
            f"A reply of any of {len(test_failures.BAD)} bad kinds (NaN, infinite, wrong shapes, masks, versions, "
            f"cut, "
            "an exception, too late, never) stops the run under `abort`, with round, client and reason; state and "
            "memories are as they were. A client that never answers is given up after twice `client_timeout`; "
            "without "
            "that setting it is waited for.",
            one(
                test_failures.test_abort_names_round_client_and_reason_and_leaves_the_state_as_it_was,
                test_failures.test_failed_round_costs_nothing_that_was_saved,
                test_failures.test_process_whose_clients_all_hang_ends_all_the_same,
            ),
        ),
        Promise(
            "Under `skip` the rest is merged with its own weights, to the bit, and the record says who was left out.",
            one(
                test_failures.test_skip_merges_the_rest_with_its_own_weights_and_records_who_was_left_out,
                test_failures.test_scores_and_votes_of_one_number_are_not_spread_over_all_weights,
                test_failures.test_several_clients_that_never_answer_are_all_given_up_and_the_run_goes_on,
                test_run.test_skipped_clients_are_recorded_beside_the_results,
                test_round.test_round_in_which_every_client_fails_stops_the_run_even_under_skip,
            ),
        ),
        Promise(
            "A client that fails when it is asked once more is one that failed in its round: the rest is merged as if "
            "it had never replied, to the bit, or nothing is.",
            one(
                test_inquiry.test_a_client_lost_in_a_further_exchange_is_one_that_failed_in_the_round,
                test_inquiry.test_under_abort_a_bad_answer_names_round_and_client_and_leaves_the_state_alone,
            ),
        ),
        Promise(
            "A run that diverges stops at once, names its last finite loss, and is recorded as diverged with the rows "
            "so far; it is shown and never averaged, and a queue goes on without it.",
            one(
                test_divergence.test_diverging_run_stops_at_once_naming_its_last_finite_loss,
                test_divergence.test_a_diverged_run_is_shown_and_never_averaged,
                test_divergence.test_a_queue_goes_on_after_a_diverging_run_and_past_one_that_another_process_holds,
                test_divergence.test_diverging_run_that_was_resumed_still_knows_its_last_finite_loss,
                test_divergence.test_command_line_reports_divergence_as_a_failed_run_not_as_bad_input,
            ),
        ),
        Promise(
            "Decoding any bytes raises nothing but `ValueError`, takes memory that data and layout bound, and "
            "never hangs.",
            {
                test_fuzz.test_mutated_messages_need_little_memory_and_no_time: test_fuzz.MUTANTS,
                test_fuzz.test_many_mutated_messages_need_little_memory_and_no_time: test_fuzz.MORE_MUTANTS,
                test_fuzz.test_message_that_announces_more_than_it_holds_is_refused_without_memory_for_it: 1,
                test_message.test_a_decompression_bomb_is_refused_within_the_memory_its_mask_may_need: 1,
                test_message.test_decode_refuses: 1,
            },
        ),
        Promise(
            "Values that travel coded are read whole or refused in one line, whatever was damaged; so is a reply in "
            "another code than its server asked for: nothing of it is merged.",
            one(
                test_codecs.test_damaged_bytes_give_finite_numbers_or_one_clear_line,
                test_codecs.test_any_bytes_at_all_raise_nothing_but_value_errors,
                test_codecs.test_what_is_wrong_with_bytes_is_said,
                test_transport.test_a_reply_in_another_code_than_asked_for_is_refused,
            ),
        ),
    ],
    "A wrong input never becomes a wrong figure": [
        Promise(
            "A wrong configuration, profile or command line gives one line with the field, the value, the range "
            "and the "
            "nearest known name, exit status 2, and nothing is written.",
            one(
                test_cli.test_wrong_value_gives_one_line_with_field_value_and_range,
                test_cli.test_wrong_command_line_gives_one_line_and_status_2,
                test_profiles.test_wrong_profile_gives_one_line_naming_file_and_entry,
                test_config.test_unknown_key_names_the_nearest_known_one,
            ),
        ),
        Promise(
            "A misspelt notebook parameter ends `tools/reproduce.py` before anything is executed. (papermill on "
            "its own "
            "only logs a warning and runs the default.)",
            one(
                test_notebook_failures.test_misspelt_parameter_ends_the_run_before_anything_is_executed,
                test_setup.test_an_unknown_profile_or_notebook_is_refused,
            ),
        ),
        Promise(
            "A notebook with a failing cell, a dead kernel, a time-out or no kernel ends `make reproduce` with its "
            "name "
            "and the error; the exit status is not 0, and the executed copy is kept.",
            one(
                test_notebook_failures.test_failing_notebook_ends_the_run_and_is_kept,
                test_setup.test_a_failing_notebook_is_named_kept_and_shown_and_ends_the_run,
                test_together.test_make_reproduce_fails_where_the_notebooks_do,
            ),
        ),
    ],
    "A name never stands for something else": [
        Promise(
            "Other data, another model or another method behind the same name is refused, with the fingerprints of "
            "both, by a run that is recorded and by one that would go on; what has no name is called by its "
            "fingerprint. Results are read without data or models.",
            one(
                test_own.test_a_registered_name_stands_for_its_data_and_other_data_behind_it_is_refused,
                test_own.test_a_run_on_own_data_is_told_apart_by_it_and_found_again,
                test_own_model.test_another_model_behind_a_name_is_refused_by_run_and_resume,
                test_own_model.test_another_method_behind_a_name_is_refused,
                test_own_model.test_fingerprint_tells_structure_source_freezing_and_given_weights_apart_and_nothing_else,
            ),
        ),
        Promise(
            "Settings that differ between the runs of a figure or table are said in the labels; two runs of one label "
            "and seed are never averaged.",
            one(
                test_curves.test_settings_that_differ_between_runs_are_said_in_labels_and_only_what_all_share_in_the_title,
                test_curves.test_two_runs_of_one_method_and_seed_are_never_averaged,
            ),
        ),
        Promise(
            "Line ends of a checkout never damage a record, and nothing that git can restore is advised to be deleted.",
            one(
                test_store.test_records_are_whole_in_a_clone_that_changes_line_ends,
                test_store.test_what_git_can_restore_is_never_advised_to_be_deleted,
            ),
        ),
    ],
    "Your own model and data": [
        Promise(
            "Any torch module gives the same bits for any number of workers, whatever it draws from PyTorch's "
            "generator, which is afterwards as it was.",
            one(
                test_own_model.test_random_layers_draw_the_same_for_any_number_of_workers_and_the_global_generator_stays_as_it_was,
                test_own_model.test_a_model_that_draws_is_recognised_and_left_alone,
            ),
        ),
        Promise(
            "Weights of all convolutions, linear, recurrent and attention layers are prunable; a shared tensor is one; "
            "what is frozen stays to the bit; the record says how much of the model is prunable, and a note if it is "
            "little.",
            one(
                test_own_model.test_weights_of_all_convolutions_linear_recurrent_and_attention_layers_are_prunable_and_nothing_else,
                test_own_model.test_a_recurrent_model_is_as_sparse_as_it_says,
                test_own_model.test_a_shared_tensor_is_one_and_stays_one,
                test_own_model.test_frozen_parameters_have_no_place_and_stay_to_the_bit,
                test_own_model.test_a_note_says_if_little_of_a_model_can_be_pruned,
            ),
        ),
        Promise(
            "A model that cannot work, and data that cannot be used, is refused in one line before anything is "
            "trained.",
            one(
                test_own_model.test_a_model_that_cannot_work_is_one_line,
                test_own_model.test_a_last_batch_of_one_that_batchnorm_cannot_take_is_refused_before_anything_is_trained,
                test_own_model.test_width_of_a_model_without_one_is_refused,
                test_own.test_what_cannot_be_used_is_one_line,
                test_own.test_what_is_no_data_at_all_is_refused,
                test_own.test_black_and_white_and_palettes_are_converted_and_what_would_lose_something_is_refused,
            ),
        ),
        Promise(
            "The model that a run leaves is plain PyTorch, with the zeros and the accuracy of the record, and so is "
            "every file it is exported to (safetensors, torch.export, ONNX).",
            one(
                test_plain_model.test_zeros_and_accuracy_are_the_records_and_all_layers_pytorchs,
                test_plain_model.test_every_file_computes_what_the_model_does_for_any_number_of_images,
                test_plain_model.test_a_model_and_data_of_ones_own_come_back_with_what_made_them,
                test_plain_model.test_two_small_batches_give_the_gradient_of_one_large_batch,
                test_own_model.test_what_is_handed_out_adds_gradients_up,
            ),
        ),
        Promise(
            "A run that stays below its target sparsity, or whose epochs are single steps, says so and why; an "
            "interrupted one says what is left of it; rows are in a file as they come.",
            one(
                test_cli.test_a_run_that_stays_below_its_target_or_steps_once_an_epoch_says_so_and_a_final_prune_reaches_it,
                test_cli.test_an_interrupted_run_says_what_is_left_of_it,
                test_observe.test_rows_are_in_a_file_as_they_come_and_the_file_goes_with_the_end,
            ),
        ),
    ],
    "Two at once": [
        Promise(
            "Two processes asked for the same run compute it once.",
            one(test_run.test_two_processes_asked_for_the_same_run_compute_it_once),
        ),
        Promise(
            f"{test_together.PROCESSES} processes on one folder: nothing torn, nothing computed twice, and when one "
            f"is "
            "killed the others finish its run.",
            one(test_together.test_ten_processes_on_one_folder_compute_every_run_once),
        ),
        Promise(
            "`make -j4` runs one target after the other.",
            one(test_together.test_make_with_four_jobs_runs_one_target_after_the_other),
        ),
    ],
}


def cases(test: Callable) -> tuple[int, int]:
    """How many sets of parameters of a test are run by `make test`, and how many by `make test-slow`."""
    marks = getattr(test, "pytestmark", [])
    values = [list(mark.args[1]) for mark in marks if mark.name == "parametrize"]
    every = math.prod(map(len, values))
    quick = 0 if is_slow(marks) else math.prod(sum(not is_slow(getattr(v, "marks", ())) for v in own) for own in values)
    return quick, every - quick


def is_slow(marks) -> bool:
    return any(mark.name == "slow" for mark in marks)


def page() -> str:
    """docs/reliability.md."""
    lines = [
        "# What is promised, and what proves it",
        "",
        "Every promise is kept by tests that break something and look at what is left: processes are killed, disks "
        "fill up, "
        "files are cut, clients lie. The columns count the cases that `make test` tries, and those that `make "
        "test-slow` "
        "adds. This page is written by `python tests/reliability/promises.py` from the tests themselves.",
    ]
    for topic, promises in PROMISES.items():
        lines += [
            "",
            f"## {topic}",
            "",
            "| promise | proved by | `make test` | `make test-slow` |",
            "|---|---|--:|--:|",
        ]
        for promise in promises:
            tried = 0, 0
            for test, count in promise.proofs.items():
                tried = [total + sets * count for total, sets in zip(tried, cases(test), strict=True)]
            names = "<br>".join(f"`{test.__module__}.{test.__name__}`" for test in promise.proofs)
            lines.append(f"| {promise.text} | {names} | {tried[0] or '–'} | {tried[1] or '–'} |")
    lines += [
        "",
        "What holds on Flower, where a server, its clients and the network fail one by one: [flower.md](flower.md).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
