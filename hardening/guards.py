"""The guards that `hardening.mutations` breaks, each with the tests that must miss it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guard:
    """A piece of code without which something goes wrong in silence, or with a traceback.

    Attributes:
        name: The rule that it keeps.
        file: Where it stands.
        old: The text of it, once in the file.
        new: What takes its place.
        tests: Of which at least one must fail then.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _guard(name: str, file: str, old: str, new: str, *tests: str) -> Guard:
    return Guard(name, f"st_embfilter/{file}", old, new, tuple(f"tests/{test}" for test in tests))


VERIFY = "saved/test_verify.py"
FOUND = "model/test_find.py"
STRANGERS = "cli/test_strangers.py"


def attacks(*names: str) -> tuple[str, ...]:
    """Tests of the attacks of these names."""
    return tuple(f"{VERIFY}::test_attacks_fail_without_a_rebuild[{name}]" for name in names)


def forged(*names: str) -> tuple[str, ...]:
    """Tests of forged baked models of these names."""
    return tuple(f"saved/test_verify_folded.py::test_forged_weights[{name}]" for name in names)


def prompts(*names: str) -> tuple[str, ...]:
    """Tests of models whose prompt is another one than their metadata name."""
    test = "saved/test_verify_prompt.py::test_another_prompt_than_the_one_that_is_named"
    return tuple(f"{test}[{name}]" for name in names)


def hostile(*names: str) -> tuple[str, ...]:
    """Tests of the hostile inputs of these names."""
    return tuple(f"test_hostile.py::test_hostile[{name}]" for name in names)


GUARDS = (
    # The same on every processor.
    _guard(
        "bits hang on no number of threads",
        "spectrum/gram.py",
        'with _threads_lock, threadpool_limits(1, user_api="blas"):',
        "with _threads_lock:",
        "test_determinism.py::test_every_direction_has_the_same_bits",
    ),
    _guard(
        "float32 is left where a prefix turns",
        "spectrum/gram.py",
        "errors[-1] <= FLOAT32_TOLERANCE and 3 * errors.max() <= PREFIX_TOLERANCE",
        "errors[-1] <= FLOAT32_TOLERANCE",
        "spectrum/test_spectrum.py::test_auto_looks_at_every_prefix",
    ),
    _guard(
        "a degenerate edge is told",
        "spectrum/gram.py",
        "if error > gap * FLOAT32_TOLERANCE:",
        "if False:",
        "spectrum/test_spectrum.py::test_a_degenerate_edge_is_told",
    ),
    _guard(
        "a Band and keep= that contradict each other",
        "spectrum/band.py",
        "given = band.keep if keep is None else",
        "given = band.keep if keep in (None, 0.5) else",
        "spectrum/test_spectrum.py::test_a_band_object_brings_its_keep",
    ),
    # Whether a model is filtered: one answer.
    _guard(
        "a filtered model on the Hub: eval",
        "evaluation/sweep.py",
        "found = find_filter(source)",
        "found = find_filter(source) if source.is_folder else None",
        f"{FOUND}::test_a_filtered_model_on_the_hub_is_measured_as_itself",
    ),
    _guard(
        "a filtered model on the Hub: bench",
        "cli/bench.py",
        "if find_filter(source) is not None:",
        "if source.is_folder and find_filter(source) is not None:",
        f"{FOUND}::test_commands_read_a_filtered_model_on_the_hub",
    ),
    _guard(
        "a filtered model on the Hub: lens",
        "lens/report.py",
        "if find_filter(source) is not None:",
        "if source.is_folder and find_filter(source) is not None:",
        f"{FOUND}::test_the_lens_and_verify_read_a_filtered_model_on_the_hub",
    ),
    _guard(
        "a filter below a folder of its own is found",
        "model/find.py",
        "if path is None and modules_file is not None:",
        "if False and modules_file is not None:",
        f"{FOUND}::test_every_form",
    ),
    _guard(
        "a prompt is not put in twice",
        "model/build.py",
        "    _check_plain(source)\n    unembedding",
        "    unembedding",
        f"{FOUND}::test_a_prompt_is_not_put_in_twice",
    ),
    _guard(
        "no filter on a filter or a trained layer",
        "model/pipeline.py",
        "    if trained:",
        "    if False:",
        "model/test_build.py::test_add_filter_to_a_filtered_model_that_is_loaded_plainly",
        "model/test_build.py::test_add_filter_to_a_model_with_a_trained_layer",
    ),
    # JSON.
    _guard(
        "json: a name twice",
        "text.py",
        "if len(found) != len(pairs):",
        "if False:",
        "test_text.py::test_refuses_what_two_readers_could_take_differently",
        *hostile("metadata says keep twice", "modules say type twice"),
    ),
    _guard(
        "json: one reader",
        "saved/results.py",
        "Result.parse(read_json(line, f",
        "Result.parse(json.loads(line) or (f",
        "test_text.py::test_no_other_reader_of_files_in_the_package",
    ),
    _guard(
        "json: depth",
        "text.py",
        "if depth == MAX_JSON_DEPTH:",
        "if False:",
        "test_text.py::test_refuses_what_two_readers_could_take_differently",
    ),
    _guard(
        "json: half a surrogate pair",
        "text.py",
        "elif escapes and isinstance(item, str) and _SURROGATE.search(item):",
        "elif False:",
        *hostile("half a surrogate pair"),
    ),
    # What is read and asked once.
    _guard(
        "the network is asked last",
        "saved/folder.py",
        "    _pipeline(model)\n    inner = backbone_model(model)",
        "    _base_card(model, token)\n    _pipeline(model)\n    inner = backbone_model(model)",
        "saved/test_links.py::test_what_cannot_be_saved_is_refused_before_the_network_is_asked",
    ),
    _guard(
        "verify reads the matrix once",
        "saved/verify.py",
        "        spectrum = found\n",
        "        spectrum = measured_spectrum(unembedding, layer.metadata)[0] or found\n",
        f"{VERIFY}::test_the_matrix_is_read_once",
    ),
    _guard(
        "load reads the filter once",
        "saved/load.py",
        "    layer = None if static else read_saved(",
        "    None if static else read_filter(source.files)\n"
        "    layer = None if static else read_saved(",
        "model/test_build.py::test_load_reads_the_filter_once",
    ),
    # What plain sentence-transformers would load is what verify looks at.
    _guard(
        "the Dense that loads is the one that is checked",
        "model/filter_files.py",
        "if found is not None and folder in (None, found.weights_folder):",
        "if found is not None:",
        *attacks("another Dense"),
    ),
    _guard(
        "only pipelines of ours",
        "saved/file_checks.py",
        "code = layout.plugin_files(document(files, MODULES_FILE, list))",
        "code = ()",
        *attacks("another backbone", "an extra LayerNorm", "no Pooling", "an unknown class"),
    ),
    _guard(
        "nothing else in the configuration of the first module",
        "saved/file_checks.py",
        "layout.check_transformer_config(document(files, layout.TRANSFORMER_CONFIG))",
        "pass",
        *attacks("arguments of transformers"),
    ),
    _guard(
        "one pooling",
        "saved/layout.py",
        "or sum(modes) != 1",
        "or False",
        *attacks("two poolings"),
    ),
    _guard(
        "Dense does what it says and no more",
        "model/modules_file.py",
        "    if unknown:",
        "    if False:",
        *attacks("Dense adds what it reads"),
    ),
    _guard(
        "code in a folder is ours, byte for byte",
        "saved/file_checks.py",
        "if found != ours and not known:",
        "if not found:",
        f"{VERIFY}::test_every_recipe_that_is_saved",
    ),
    _guard(
        "code in a folder does not run untrusted",
        "saved/verify.py",
        "if self.code and not self.source.trust_remote_code:",
        "if False:",
        f"{VERIFY}::test_edited_code_never_runs_without_trust",
    ),
    _guard(
        "nothing else is called on the backbone",
        "saved/layout.py",
        "if called not in (TEXT_ONLY, MESSAGES):",
        "if False:",
        *attacks("another method of the backbone"),
    ),
    _guard(
        "the settings of sentence-transformers are ours",
        "saved/file_checks.py",
        "prompt = layout.check_model_config(document(files, layout.MODEL_CONFIG))",
        'prompt = ""',
        *attacks(
            "prompts that are no texts", "a prompt that is not there", "another kind of model"
        ),
    ),
    _guard(
        "the weights that load are those that are checked",
        "saved/file_checks.py",
        "    if OTHER_WEIGHTS in config:",
        "    if False:",
        *attacks("other weights"),
    ),
    _guard(
        "the weights that load are those that a filter is made of",
        "unembedding/source.py",
        "if getattr(config, OTHER_WEIGHTS, None) is not None:",
        "if False:",
        *hostile("weights in another file"),
    ),
    _guard(
        "a baked model has no adapter",
        "saved/baked_checks.py",
        'return check_surroundings(files, "as export writes them")',
        'return True, "as export writes them"',
        *forged("an adapter of itself", "other weights", "code of its own"),
    ),
    _guard(
        "a baked model has the configuration of its language model",
        "saved/baked_checks.py",
        "if key not in _EXPORTED and mine != theirs:",
        "if False:",
        *forged("an activation", "heads", "a base of RoPE"),
    ),
    _guard(
        "a baked model has the tokenizer of its language model",
        "saved/baked_checks.py",
        "    if differ:",
        "    if False:",
        *forged("two words"),
    ),
    # The prompt that is named is the one that is put in.
    _guard(
        "prompt: the tokens are the recipe's",
        "saved/prompt_checks.py",
        "        if ids[at : at + len(whole)] == whole:",
        "        if True:",
        *prompts("two tokens swapped", "another template is named of echo"),
    ),
    _guard(
        "prompt: nothing else stands around texts",
        "saved/prompt_checks.py",
        "if found is None or not special.issuperset(found[0] + found[1]):",
        "if found is None:",
        *prompts("no prompt is named", "a word before BOS", "baked: no prompt is named"),
    ),
    _guard(
        "prompt: the modules are the recipe's",
        "saved/prompt_checks.py",
        "    if wrong is not None:",
        "    if False:",
        *prompts("messages without a prompt", "no recipe of several is named"),
    ),
    _guard(
        "prompt: the chat template is the recipe's",
        "saved/prompt_checks.py",
        "same = tokenizer.chat_template == chat_template(tokenizer, recipe.templates[0])",
        "same = True",
        *prompts("another chat template", "a chat template of a file"),
    ),
    _guard(
        "prompt: every template of several is the recipe's",
        "saved/prompt_checks.py",
        'same = config.get("prompt_token_ids") == recipe.passes(tokenizer, start)',
        "same = True",
        *prompts("other templates", "a template less", "other templates are named"),
    ),
    _guard(
        "prompt: ECHO pools what stands behind its prompt",
        "saved/prompt_checks.py",
        'if pooled != {"embedding_dimension": d, "fixed_tokens": fixed}:',
        "if False:",
        *prompts("another number of tokens of the prompt", "a width that is none"),
    ),
    _guard(
        "prompt: texts begin as those of the language model",
        "saved/prompt_checks.py",
        "        if start != wanted:",
        "        if False:",
        "saved/test_verify_prompt.py::"
        "test_what_a_text_begins_with_is_told_and_held_against_the_language_model",
    ),
    _guard(
        "prompt: a static model has none",
        "saved/static_checks.py",
        "    if metadata.prompt is not None:",
        "    if False:",
        "saved/test_verify_prompt.py::test_a_static_model_has_no_prompt",
    ),
    _guard(
        "pipes are not read",
        "model/backbone.py",
        "for file in filter(Path.is_file, sorted(folder.glob(",
        "for file in iter(sorted(folder.glob(",
        "saved/test_links.py::test_a_pipe_in_the_source_is_not_opened",
    ),
    # The filter is that of the matrix.
    _guard(
        "rows are directions",
        "saved/checks.py",
        "if not worst <= 2 * rounding:",
        "if False and not worst:",
        *attacks(
            "rows of dropped directions", "no spectrum, rotated rows", "no spectrum, swapped rows"
        ),
    ),
    _guard(
        "rows have their sign",
        "saved/checks.py",
        "if bool(flipped.any()):",
        "if False:",
        *attacks("a flipped sign", "no spectrum, a flipped sign"),
    ),
    _guard(
        "the stored spectrum is that of the matrix",
        "saved/checks.py",
        "good = bool((error <= limit).all())",
        "good = True",
        *attacks("a spectrum forged outside", "a spectrum forged inside"),
    ),
    _guard(
        "every prefix spans what is built anew",
        "saved/checks.py",
        "if angle > float(across.square().sum().sqrt()) + rounding:",
        "if False:",
        f"{VERIFY}::test_rows_in_another_order",
        f"{VERIFY}::test_another_space",
    ),
    _guard(
        "what is absent is unproven",
        "saved/checks.py",
        'return None, "none is stored; save',
        'return True, "none is stored; save',
        f"{VERIFY}::test_what_is_absent_is_unproven",
    ),
    _guard(
        "unproven is no success",
        "cli/verify.py",
        "        raise typer.Exit(UNPROVEN)",
        "        return",
        f"{VERIFY}::test_what_is_absent_is_unproven",
    ),
    _guard(
        "calibration on given texts is unproven without them",
        "saved/verify.py",
        "        if isinstance(texts, str):\n            return None, texts\n        model",
        "        if isinstance(texts, str):\n            return True, texts\n        model",
        f"{VERIFY}::test_a_calibrated_model",
    ),
    _guard(
        "calibration on other texts proves nothing",
        "saved/calibration_checks.py",
        "if texts_hash(texts) != record.sha256:",
        "if False:",
        f"{VERIFY}::test_a_calibrated_model",
        f"{VERIFY}::test_a_model_calibrated_with_generic_texts",
    ),
    _guard(
        "a made-up calibration fails",
        "saved/calibration_checks.py",
        "return (False if difference > rounding else None), told",
        "return None, told",
        f"{VERIFY}::test_a_model_calibrated_with_its_own_texts",
        "saved/test_verify_folded.py::test_the_calibration_of_a_table_is_repeated",
    ),
    _guard(
        "a made-up calibration of a static model fails",
        "saved/calibration_checks.py",
        "return verdict(max(of_rows, of_centre), made, held.gain, checks.encoding_error(wide))",
        "return verdict(0.0, made, held.gain, checks.encoding_error(wide))",
        "saved/test_verify_folded.py::test_the_calibration_of_a_table_is_repeated",
    ),
    _guard(
        "texts that are sampled again are bounded",
        "saved/calibration_checks.py",
        "elif record.texts > MAX_SAMPLED:",
        "elif False:",
        f"{VERIFY}::test_a_model_calibrated_with_its_own_texts",
    ),
    _guard(
        "weights of tokens are those that there are",
        "model/metadata.py",
        "if weights is not None and (layers != 0 or weights not in TOKEN_WEIGHTS):",
        "if False:",
        "saved/test_verify_folded.py::test_weights_of_tokens_that_are_unknown",
    ),
    _guard(
        "--base names the model of a filter",
        "saved/verify.py",
        "if self.base is not None:",
        "if False:",
        f"{VERIFY}::test_a_filter_of_a_local_model_names_it",
    ),
    # Whole backbones.
    _guard(
        "missing weights: build and load",
        "model/whole.py",
        "        if names:\n",
        "        if False:\n",
        "model/test_whole.py::test_damaged_weights_of_a_language_model",
        "model/test_whole.py::test_damaged_weights_of_a_saved_model",
    ),
    _guard(
        "NaN in weights: build",
        "model/backbone.py",
        "    check_finite(backbone.auto_model, source.name)\n",
        "",
        "model/test_whole.py::test_damaged_weights_of_a_language_model",
    ),
    _guard(
        "NaN in weights: load",
        "saved/load.py",
        "    check_finite(model, source.name)\n",
        "",
        "model/test_whole.py::test_damaged_weights_of_a_saved_model",
    ),
    _guard(
        "NaN in hidden states: build",
        "model/backbone.py",
        "if not bool(torch.isfinite(hidden).all()):",
        "if False:",
        "model/test_whole.py::test_hidden_states_that_are_no_numbers",
        "saved/test_dtype.py::test_load_tries_one_token",
    ),
    _guard(
        "missing weights: verify",
        "saved/checks.py",
        "        if names:\n            what",
        "        if False:\n            what",
        *attacks("a tensor is missing"),
    ),
    _guard(
        "NaN in weights: verify",
        "saved/checks.py",
        "if value.is_floating_point() and not is_finite(value):",
        "if False:",
        *attacks("NaN in a layer", "Inf in a layer"),
    ),
    _guard(
        "odd numbers in the config: verify",
        "saved/file_checks.py",
        "    if odd is not None:",
        "    if False:",
        *attacks("an epsilon of 10^9", "an epsilon of NaN"),
    ),
    _guard(
        "weights of another shape are not made up",
        "model/whole.py",
        'if "ignore_mismatched_sizes" not in str(error):',
        "if True:",
        *hostile("a layer of another shape", "a layer of astronomical size"),
    ),
    _guard(
        "NaN in what is computed from the config",
        "model/whole.py",
        "if value.is_floating_point() and not is_finite(value.clamp(min=0))",
        "if False",
        *hostile("angles that are no numbers"),
    ),
    _guard(
        "a model that loads without its filter",
        "saved/load.py",
        "    if dense is None:",
        "    if False:",
        *hostile("another kind of model"),
    ),
    _guard(
        "a card knows no aliases",
        "saved/card_rules.py",
        "if self.check_event(yaml.AliasEvent):",
        "if False:",
        "saved/test_card.py::test_a_card_that_grows_inherits_nothing",
    ),
    _guard(
        "a card's YAML fails in many ways",
        "saved/card_rules.py",
        "    except Exception:  # YAML of strangers",
        "    except yaml.YAMLError:  # YAML of strangers",
        "saved/test_card.py::test_metadata_that_no_parser_reads_are_none",
    ),
    # Links.
    _guard(
        "link: a name in a folder that nobody can prepare",
        "files/staging.py",
        'path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")',
        'path.with_name(f".{path.name}.tmp")',
        "saved/test_links.py::test_prepared_links_are_not_written_through",
    ),
    _guard(
        "link: push",
        "saved/push.py",
        "    if linked:",
        "    if False:",
        "saved/test_links.py::test_a_push_uploads_no_link_out_of_the_folder",
    ),
    _guard(
        "link: card and every reader of files",
        "files/folder.py",
        "        check_inside(path, self._folder)\n",
        "",
        "saved/test_links.py::test_a_card_reads_no_link_out_of_the_folder",
        *hostile("weights behind a link", "projection behind a link"),
    ),
    _guard(
        "link: what transformers reads",
        "model/backbone.py",
        "        check_links(Path(source.name))\n",
        "        pass\n",
        *hostile("tokenizer behind a link"),
    ),
    _guard(
        "link: what is copied into a saved model",
        "saved/folder.py",
        "        check_links(source)  # no file of this machine becomes part of a model\n",
        "",
        "saved/test_links.py::test_a_link_in_the_source_is_not_copied",
    ),
    _guard(
        "link: verify",
        "saved/verify.py",
        '        if found:\n            return False, f"{len(found)} links',
        '        if False:\n            return False, f"{len(found)} links',
        *attacks("a link beside", "a link that is hidden", "a link to a folder"),
    ),
    _guard(
        "the file that transformers reads, beside a left-over index",
        "files/tensors.py",
        "if single is not None:",
        "if single is not None and files.path(SAFETENSORS_INDEX) is None:",
        "saved/test_links.py::test_weights_beside_a_left_over_index_are_those_that_transformers_reads",
    ),
    # Saved as it was asked for.
    _guard(
        "the dtype that was asked for is saved",
        "saved/folder.py",
        "dtype = other_dtype(inner, source)",
        "dtype = None",
        "saved/test_dtype.py::test_a_model_that_was_cast_after_it_was_built",
    ),
    _guard(
        "a cast leaves the matrix that was hashed",
        "saved/cast.py",
        "(name == unembedding and rounds)",
        "False",
        "saved/test_dtype.py::test_the_dtype_that_was_asked_for",
    ),
    *(
        _guard(
            f"card: {option} is in the command",
            "saved/card.py",
            f'("{option}", {value})',
            f'("{option}", None)',
            "saved/test_card.py::test_the_command_of_the_card_builds_the_same_bytes",
        )
        for option, value in (
            ("--calibration-size", "_size_option(facts.calibration)"),
            ("--calibration-seed", "_seed_option(facts.calibration)"),
            ("--pooling", "_pooling_option(facts)"),
            ("--norm", "facts.norm"),
            ("--layers", "None if facts.depth is None else str(facts.depth.layers)"),
        )
    ),
    _guard(
        "a damaged cache is encoded again",
        "evaluation/vectors.py",
        "return stored if whole and bool(np.isfinite(stored).all()) else None",
        "return stored",
        "evaluation/test_sweep.py::test_a_damaged_cache_file_is_made_anew",
    ),
    # Errors of ours for every file of a stranger.
    _guard(
        "every failure of a parser is an error of ours",
        "text.py",
        'return isinstance(error, Exception) or type(error).__name__ == "PanicException"',
        "return isinstance(error, ValueError)",
        f"{STRANGERS}::test_the_boundary_keeps_our_errors_and_replaces_all_others",
        f"{STRANGERS}::test_an_unforeseen_failure_is_one_sentence",
    ),
    _guard(
        "a panic of Rust is an error of ours",
        "text.py",
        'return isinstance(error, Exception) or type(error).__name__ == "PanicException"',
        "return isinstance(error, Exception)",
        *hostile("a normalizer at which Rust panics", "a template at which Rust panics"),
    ),
    _guard(
        "no pickle of an adapter runs",
        "unembedding/adapter.py",
        'weights = torch.load(path, map_location="cpu", weights_only=True)',
        'weights = torch.load(path, map_location="cpu", weights_only=False)',
        *hostile("adapter that is a pickle with code"),
    ),
    _guard(
        "no pickle of a checkpoint runs",
        "files/tensors.py",
        'state = torch.load(path, map_location="cpu", weights_only=True)\n        except',
        'state = torch.load(path, map_location="cpu", weights_only=False)\n        except',
        *hostile("old pickle with code"),
    ),
    _guard(
        "adapter: lora_alpha is a number",
        "unembedding/adapter.py",
        "if type(alpha) not in (int, float) or not abs(alpha) < 1e9:",
        "if False:",
        *hostile("adapter without lora_alpha", "adapter with alpha in words"),
    ),
    _guard(
        "adapter: revision is a name",
        "unembedding/adapter.py",
        'if not isinstance(config.get("revision"), str | None):',
        "if False:",
        *hostile("adapter with a list as revision"),
    ),
    _guard(
        "adapter: patterns are regular expressions",
        "unembedding/adapter.py",
        "except (re.error, RecursionError) as error:",
        "except RecursionError as error:",
        *hostile("adapter with a bad pattern"),
    ),
    _guard(
        "an adapter without a tokenizer has that of its base model",
        "model/backbone.py",
        "if adapter.files.path(TOKENIZER_CONFIG) is not None:",
        "if True:",
        "model/test_whole.py::test_an_adapter_without_a_tokenizer_has_its_base_models",
    ),
    _guard(
        "a projection in fp8",
        "model/filter_files.py",
        "fits = tuple(projection.shape) == expected and projection.dtype in _DTYPES",
        "fits = tuple(projection.shape) == expected",
        *hostile("projection in fp8"),
    ),
    _guard(
        "metadata: dtype names one",
        "model/metadata.py",
        "if not isinstance(getattr(torch, provenance.dtype, None), torch.dtype):",
        "if not hasattr(torch, provenance.dtype):",
        *hostile("dtype is a function"),
    ),
    _guard(
        "metadata: astronomical seeds",
        "model/metadata.py",
        "if seed is not None and not 0 <= seed < 2**63:",
        "if False:",
        *hostile("a calibration with a seed of 10^30"),
    ),
    _guard(
        "--band random: astronomical seeds",
        "spectrum/band.py",
        "if not 0 <= seed < 2**63:",
        "if False:",
        f"{STRANGERS}::test_what_a_user_can_get_wrong",
    ),
    _guard(
        "settings of generation that are none are one error",
        "model/sampling.py",
        '@reading("the language model", CalibrationError, "write texts to calibrate on")\n',
        "",
        *(
            "model/test_sampling.py::test_no_setting_of_a_stranger_reaches_the_sampler"
            f"[generation_config.json-{one}]"
            for one in ("an end of words", "an end of 10^30")
        ),
    ),
    _guard(
        "no token is drawn from logits that are no numbers",
        "model/decode.py",
        "if not bool(whole.isfinite().all()):",
        "if False:",
        "model/test_decode.py::test_logits_that_are_no_numbers",
    ),
    _guard(
        "rounding draws no token without a chance",
        "model/decode.py",
        "torch.minimum(at * whole, below)",
        "at * whole",
        "model/test_decode.py::test_a_place_has_a_weight",
    ),
    _guard(
        "a text that has ended stays so",
        "model/decode.py",
        ".masked_fill_(ended, pad)",
        "",
        "model/test_decode.py::test_a_text_ends_at_its_end",
    ),
    _guard(
        "max_seq_length is a length",
        "saved/layout.py",
        "if length is not None and (type(length) is not int or not 1 <= length < 2**31):",
        "if False:",
        *hostile("length of -1", "length in words"),
    ),
    _guard(
        "a name that no file can have",
        "files/folder.py",
        "except (OSError, ValueError):  # a name",
        "except ValueError:  # a name",
        f"{VERIFY}::test_a_name_that_is_none",
    ),
    _guard(
        "qrels: gains are whole numbers",
        "evaluation/data.py",
        're.compile("[+-]?[0-9]{1,9}")',
        're.compile("[^ ]+")',
        f"{STRANGERS}::test_noise_in_a_file[beir/qrels/test.tsv]",
    ),
    _guard(
        "a device that is not here",
        "cli/app.py",
        "            torch.zeros(1, device=name)\n",
        "            pass\n",
        f"{STRANGERS}::test_what_a_user_can_get_wrong",
    ),
    *(
        _guard(
            what,
            "files/staging.py",
            old,
            new,
            f"{STRANGERS}::test_what_a_user_can_get_wrong",
            f"{STRANGERS}::test_a_home_that_cannot_be_written",
        )
        for what, old, new in (
            (
                "an output that is a folder",
                "        if os.path.isdir(file):\n",
                "        if False:\n",
            ),
            (
                "a cache, a home or a results file that cannot be written",
                "except (OSError, ValueError) as error:  # a name too long",
                "except ValueError as error:  # a name too long",
            ),
            (
                "a folder whose name is too long",
                "    if os.path.isdir(target):  # False",
                "    if target.is_dir():  # False",
            ),
        )
    ),
    *(
        _guard(
            f"a name of 300 letters: {what}",
            file,
            old,
            new,
            f"{STRANGERS}::test_what_a_user_can_get_wrong",
        )
        for what, file, old, new in (
            ("any command", "cli/app.py", "os.path.isdir(model)", "Path(model).is_dir()"),
            (
                "a model",
                "unembedding/gguf.py",
                "if not os.path.isdir(path) or any",
                "if not path.is_dir() or any",
            ),
            (
                "a corpus of the lens",
                "lens/counts.py",
                "    if not os.path.isfile(path):",
                "    if not path.is_file():",
            ),
            (
                "data",
                "evaluation/data.py",
                "if os.path.isfile(place / name)), None)",
                "if (place / name).is_file()), None)",
            ),
        )
    ),
    _guard(
        "a corrupt gzip body, of data",
        "evaluation/data.py",
        "    with reading(path, DataError):\n        try:",
        "    if True:\n        try:",
        "evaluation/test_data.py::test_bad_files",
    ),
    _guard(
        "a corrupt gzip body, of a corpus",
        "corpus/inputs.py",
        "    except Exception as error:  # whatever a parser or a file system raises\n",
        "    except ValueError as error:  # whatever a parser or a file system raises\n",
        "corpus/test_inputs.py::test_an_input_whose_middle_is_damaged",
        "corpus/test_inputs.py::test_an_input_that_breaks_off_or_vanishes",
    ),
    _guard(
        "results that are no UTF-8",
        "saved/results.py",
        "    with reading(path, DataError):\n",
        "    if True:\n",
        "evaluation/test_output.py::test_results_that_are_no_text",
    ),
    _guard(
        "results: counts of 10^30",
        "saved/results.py",
        "(type(value) is int and abs(value) >= 2**53)",
        "False",
        "evaluation/test_output.py::test_results_that_are_no_text",
    ),
    _guard(
        "half a surrogate in an id",
        "corpus/inputs.py",
        "and not key.isascii() and not _encodes(key):",
        "and False:",
        "corpus/test_inputs.py::test_bad_rows_of_tables_and_parquet",
    ),
    *(
        _guard(
            f"a column that is named twice: {what}",
            file,
            old,
            new,
            "corpus/test_inputs.py::test_a_column_that_is_named_twice",
        )
        for what, file, old, new in (
            (
                "Parquet",
                "corpus/columns.py",
                "if any(schema.names.count(name) > 1 for",
                "if any(False for",
            ),
            ("tables", "corpus/lines.py", "if header.count(name) > 1:", "if False:"),
        )
    ),
    _guard(
        "a GGUF file of another width",
        "saved/gguf_out.py",
        "if like is not None and like.shape[1] != shape[1]:",
        "if False:",
        "saved/test_gguf_out.py::test_a_file_of_another_width_is_refused",
    ),
    _guard(
        "counts of tokens: astronomical numbers",
        "lens/counts.py",
        "if not 0 < size <= MAX_VOCABULARY or not 0 <= texts < 2**53:",
        "if False:",
        "lens/test_counts.py::test_damaged_counts_are_refused",
    ),
    _guard(
        "a key of GGUF twice",
        "unembedding/gguf.py",
        "if key in metadata:  # llama.cpp",
        "if False:  # llama.cpp",
        "model/test_gguf.py::test_headers_that_are_refused",
    ),
    _guard(
        "every failure of a GGUF header is an error of ours",
        "unembedding/gguf.py",
        "        except Exception as error:  # files of strangers",
        "        except ValueError as error:  # files of strangers",
        "model/test_gguf.py::test_headers_that_are_refused",
    ),
    _guard(
        "every failure of a GGUF tokenizer is an error of ours",
        "model/gguf_tokenizer.py",
        'with reading(f"the tokenizer of {file.path.name}", BackboneError, "be whole"):',
        "if True:",
        "model/test_gguf.py::test_models_that_are_refused",
    ),
    _guard(
        "the card of a static model",
        "saved/card_facts.py",
        "        METADATA_FILE,\n        *(f",
        "        *(f",
        "model/test_static.py::test_the_card_written_anew_is_the_card",
    ),
    _guard(
        "vectors that are not finite are not filtered in silence",
        "corpus/stored.py",
        "if not bool(torch.isfinite(part).all()):",
        "if False:",
        "corpus/test_stored.py::test_vectors_that_are_not_finite",
    ),
    # What is shown.
    _guard(
        "escape sequences do not reach the terminal",
        "cli/app.py",
        'return super().render_str(visible(text, keep="\\n"), **options)',
        "return super().render_str(text, **options)",
        f"{STRANGERS}::test_a_strangers_text_does_not_steer_the_terminal",
    ),
    _guard(
        "escape sequences do not reach messages",
        "text.py",
        '[: limit - 3]}..."\n    return visible(text)',
        '[: limit - 3]}..."\n    return text',
        "test_text.py::test_shown_is_one_printable_line",
    ),
    *(
        _guard(
            f"names do not break the card: {what}",
            "text.py",
            old,
            new,
            "saved/test_card.py::test_names_of_strangers_cannot_break_the_card",
            "test_text.py::test_code_stays_in_its_line_and_its_cell",
            "test_text.py::test_a_strangers_words_make_nothing_of_their_own_in_markdown",
        )
        for what, old, new in (
            ("code", "    line = shown(text, limit=100_000)", "    line = str(text)"),
            ("tables", 'return code(text).replace("|", "\\\\|")', "return code(text)"),
            ("HTML", 'r"([\\\\`\\[\\]<>|&])", r"\\\\\\1"', 'r"(~~)", r"\\1"'),
        )
    ),
    # What a user can get wrong.
    _guard(
        "a mistyped GGUF file",
        "unembedding/source.py",
        'if self.name.lower().endswith(".gguf") and not os.path.exists(self.name):',
        "if False:",
        f"{STRANGERS}::test_what_a_user_can_get_wrong",
    ),
    _guard(
        "--keep 1 says what it is",
        "cli/app.py",
        'if text == "1":',
        "if False:",
        f"{STRANGERS}::test_keep_1_says_what_it_is",
    ),
    _guard(
        "--version",
        "cli/app.py",
        "        raise typer.Exit\n",
        "        return\n",
        f"{STRANGERS}::test_help_and_version",
    ),
    _guard(
        "inspect shows pooling, length and normalisation",
        "cli/inspect.py",
        "        **_pipeline_rows(opened),\n",
        "",
        "cli/test_cli.py::test_build_and_inspect",
    ),
    _guard(
        "the band 'optimal' says where it is measured",
        "spectrum/band.py",
        'if self.family == "optimal" and self.order is None:',
        "if False:",
        f"{STRANGERS}::test_what_a_user_can_get_wrong",
    ),
    _guard(
        "another pipeline is saved by sentence-transformers",
        "saved/folder.py",
        '+ "; a saved model is opened with st_embfilter.load to be saved again, other pipelines "',
        '+ "; other pipelines "',
        "saved/test_publish.py::test_other_pipelines_are_refused",
    ),
    _guard(
        "a model with code says which option lets it run: eval",
        "cli/evaluate.py",
        "        trust_remote_code=trust_remote_code,\n        folded",
        "        folded",
        f"{STRANGERS}::test_a_model_with_code_says_which_option_lets_it_run",
    ),
    _guard(
        "a model with code says which option lets it run: bench",
        "cli/bench.py",
        "source = Source(model, revision, trust_remote_code=trust_remote_code)",
        "source = Source(model, revision)",
        f"{STRANGERS}::test_a_model_with_code_says_which_option_lets_it_run",
    ),
    _guard(
        "the sum of a long text stays finite in float16",
        "model/static.py",
        "if chosen is torch.float16:",
        "if False:",
        "model/test_static.py::test_long_texts_are_finite_in_float16",
    ),
    _guard(
        "a table of float16 with entries above 1 is told",
        "saved/static_checks.py",
        "if table.dtype is torch.float16 and float(table.abs().max()) > 1:",
        "if False:",
        "model/test_static.py::test_long_texts_are_finite_in_float16",
    ),
    _guard(
        "a sign that hangs on the last bits is no forgery",
        "saved/static_checks.py",
        "return self.coordinates[:, self.indices] * self.signs",
        "return self.coordinates[:, self.indices]",
        "saved/test_verify_folded.py::test_a_sign_that_hangs_on_the_last_bits",
    ),
    _guard(
        "directions that are open are the same in all rows of a table",
        "saved/static_checks.py",
        "    _see_one_map(far, coordinates, stored, rounding, lengths)\n",
        "",
        "saved/test_verify_folded.py::test_directions_that_turn_in_one_row",
    ),
    _guard(
        "a GGUF file is read in the dtype of the build",
        "saved/verify.py",
        "readable(base, made_from.dtype,",
        "readable(base, None,",
        "saved/test_verify_gguf.py::test_a_model_of_a_file_is_that_of_the_file[static-bfloat16]",
    ),
    _guard(
        "also for a filter that was taken out of a model",
        "saved/verify.py",
        "whole = layer.metadata.provenance.gguf_sha256 is not None",
        "whole = False",
        "saved/test_verify_gguf.py::test_a_model_of_a_file_is_that_of_the_file[alone-None]",
    ),
    _guard(
        "but not for one that was made of W_U alone",
        "saved/verify.py",
        "whole = layer.metadata.provenance.gguf_sha256 is not None",
        "whole = True",
        "saved/test_verify_gguf.py::test_a_filter_of_the_matrix_alone",
    ),
    _guard(
        "a GGUF file says what texts begin with",
        "saved/prompt_checks.py",
        "if gguf is not None:",
        "if False:",
        "saved/test_verify_gguf.py::test_a_model_of_a_file_is_that_of_the_file[portable-None]",
    ),
    _guard(
        "a sign that does not is one",
        "saved/static_checks.py",
        "torch.where(either & (agreement < 0), -1.0, 1.0)",
        "torch.where(agreement < 0, -1.0, 1.0)",
        "saved/test_verify_folded.py::test_a_sign_that_hangs_on_the_last_bits",
    ),
    _guard(
        "a check that raises has failed",
        "saved/checks.py",
        'with reading(f"what the check {name!r} compares", must="be comparable"):',
        "if True:",
        "saved/test_checks.py::test_a_check_that_raises_has_failed",
    ),
    _guard(
        "a table of integers is none",
        "saved/static.py",
        " and table.dtype in FLOATS",
        "",
        "saved/test_verify_folded.py::test_a_table_that_is_none",
    ),
    _guard(
        "rotated weights in eight bits are none of ours",
        "saved/baked_checks.py",
        "if unembedding.stored.dtype not in layout.FLOATS:",
        "if False:",
        "saved/test_verify_folded.py::test_forged_weights",
    ),
)
