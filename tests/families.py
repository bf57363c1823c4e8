"""Tiny models of many families, with random weights, as people bring them to lesson 4.

What is true to the real family is what has gone wrong there: its special tokens, what
its tokenizer adds to a text, its chat template, and where the tokens stand that end a
response: in generation_config.json, in the tokenizer, or only in the chat template.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
import torch
import transformers


@dataclass(frozen=True)
class Family:
    """What has to be known to build a model, and what is right for it."""

    kind: str  # model_type, as in config.json
    tokens: str  # the tokenizer's special tokens | what it makes of a text, $A
    template: str = ""  # of a chat
    ends: str = ""  # every token that ends a response, if not only eos
    generation: dict = field(default_factory=dict)  # what generation_config.json holds
    prompt: str = "Say hi"
    sizes: dict = field(default_factory=dict)  # where they differ from SIZES
    left: bool = False  # the tokenizer pads on the left

    @property
    def special(self):
        """All special tokens; their place is their number."""
        found = " ".join([self.tokens, self.ends, self.template])
        return list(dict.fromkeys(re.findall(r"<\S+?>|\[/?[A-Z]+\]", found)))

    def ids(self, tokens):
        return [self.special.index(token) for token in tokens.split()]


SIZES = {  # each family takes what it has of these
    **{"hidden_size": 32, "d_model": 32, "word_embed_proj_dim": 32, "head_dim": 16},
    **{"num_hidden_layers": 2, "num_layers": 2},
    **{"num_attention_heads": 2, "num_heads": 2, "num_key_value_heads": 1},
    **{"intermediate_size": 64, "ffn_dim": 64, "state_size": 4, "window_size": 8},
    **{"max_position_embeddings": 256, "dropout": 0.5, "pos_att_type": ["p2c", "c2p"]},
    **{"query_pre_attn_scalar": 16, "relative_attention": True, "encoder_layers": 1},
    **{"logit_scale": 1.0, "initializer_range": 0.2},  # clearly unequal probabilities
}


def chat(turn, answer, start="{{ bos_token }}", close="", model="assistant"):
    """A chat template: `turn` has ROLE and TEXT; `answer` begins the model's turn."""
    role = f"{{{{ '{model}' if m.role == 'assistant' else m.role }}}}"
    turn = turn.replace("TEXT", "{{ m.content | trim }}").replace("ROLE", role)
    turn, answer = (text.replace("\n", "{{ '\\n' }}") for text in (turn, answer))
    answer = "{% if add_generation_prompt %}" + answer + "{% else %}" + close
    return f"{start}{{% for m in messages %}}{turn}{{% endfor %}}{answer}{{% endif %}}"


CHATML = "<|im_start|>ROLE\nTEXT<|im_end|>\n", "<|im_start|>assistant\n"
LLAMA_3 = chat(
    "<|start|>ROLE<|end|>\n\nTEXT<|eot_id|>", "<|start|>assistant<|end|>\n\n"
)
GEMMA = "<start_of_turn>ROLE\nTEXT<end_of_turn>\n", "<start_of_turn>model\n"
PHI_3 = "<|ROLE|>\nTEXT<|end|>\n", "<|assistant|>\n", "", "{{ eos_token }}"
COHERE_CHAT = "<|START|><|ROLE|>TEXT<|END|>", "<|START|><|chatbot|>"
GPT2 = "bos=<|endoftext|> eos=<|endoftext|> unk=<|endoftext|>"
LLAMA = "bos=<s> eos=</s> unk=<unk> | <s> $A"
BERT = "cls=[CLS] sep=[SEP] pad=[PAD] unk=[UNK] eos=[SEP] | [CLS] $A [SEP]"
LFM = "bos=<s> eos=<|im_end|> pad=<|pad|> | <s> $A"
COHERE = "bos=<BOS> eos=<|END|> <|user|> | <BOS> $A"
QWEN = "eos=<|endoftext|> pad=<|endoftext|>"
SAMPLING = {"do_sample": True, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
WINDOW = {"sliding_window": 8}  # tokens, fewer than the prompt has
HYBRID = {"layer_types": ["conv", "full_attention"]}

POLICIES = {
    "gpt2": Family("gpt2", GPT2),  # no token for padding
    # The end token of OPT also begins every text, and its dropout is no module.
    "opt": Family("opt", "bos=</s> eos=</s> pad=<pad> | </s> $A"),
    "llama, add_eos_token": Family("llama", LLAMA + " </s>"),
    "llama 3": Family(  # both tokenizer and template begin a text with bos
        "llama",
        "bos=<|begin_of_text|> eos=<|eot_id|> | <|begin_of_text|> $A",
        LLAMA_3,
        ends="<|end_of_text|> <|eom_id|> <|eot_id|>",
        generation={"ends": 3, "do_sample": True, "temperature": 0.6},
    ),
    "gemma 2": Family(  # save_pretrained() would refuse a top_k without do_sample
        "gemma2",
        "bos=<bos> eos=<eos> pad=<pad> unk=<unk> | <bos> $A",
        chat(*GEMMA, model="model"),
        ends="<eos> <end_of_turn>",
        generation={"ends": 2, "top_k": 64, "cache_implementation": "hybrid"},
        sizes=WINDOW,
    ),
    "phi 3": Family(
        "phi3",
        "bos=<s> eos=<|endoftext|> pad=<|endoftext|>",
        chat(*PHI_3),
        "<|endoftext|> <|user|> <|assistant|> <|end|>",
        {"ends": 3},
        sizes=WINDOW,
    ),
    "qwen 2, base": Family(  # only its template knows how a turn ends
        "qwen2", QWEN, chat(*CHATML, ""), "<|endoftext|> <|im_end|>", SAMPLING
    ),
    "mistral, formatted prompt": Family(
        "mistral", LLAMA, prompt="<s> [INST] Say hi [/INST]", sizes=WINDOW
    ),
    "mamba": Family("mamba", "eos=<|endoftext|>"),  # it has no past_key_values
    "lfm2": Family("lfm2", LFM, chat(*CHATML), sizes=HYBRID),
    "cohere": Family("cohere", COHERE, chat(*COHERE_CHAT, model="chatbot")),
    "gpt_neox": Family("gpt_neox", GPT2, sizes={"vocab_size": 300}),  # 43 more
}
REWARD_MODELS = {
    "bert": Family("bert", BERT),
    "bert, pads on the left": Family("bert", BERT, left=True),
    "deberta": Family("deberta-v2", BERT),
    "gpt2, pads on the left": Family("gpt2", f"{GPT2} pad=<|pad|>", left=True),
    "gpt2, neither pads nor ends": Family("gpt2", "unk=<unk>"),
    "qwen 2, chat": Family("qwen2", QWEN, chat(*CHATML, ""), left=True),
    # Llama begins a text once, and has no token for padding.
    "llama 3, chat": Family("llama", "bos=<s> eos=<|eot_id|> | <s> $A", LLAMA_3),
}
NO_POLICIES = {"an encoder": Family("bert", BERT), "bart": Family("bart", LLAMA)}


def make_tokenizer(family):
    """Special tokens come first, and then every byte is a token."""
    named, _, text = family.tokens.partition(" | ")
    text, special = text or "$A", family.special
    words = special + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(words)}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single=text.split(),
        pair=f"{text} $B:1 {text.partition('$A')[2]}".split(),
        special_tokens=[(word, words[word]) for word in special],
    )
    core.add_special_tokens(special)
    pairs = [pair.split("=") for pair in named.split() if "=" in pair]
    options = {f"{role}_token": word for role, word in pairs}
    options |= {"padding_side": "left"} if family.left else {}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = family.template or None
    return tokenizer


def save(family, folder, head="CausalLM"):
    """Write the model, with random weights, and its tokenizer into a folder."""
    tokenizer = make_tokenizer(family)
    names = [f"{role}_token_id" for role in ("bos", "eos", "pad")]
    options = {name: getattr(tokenizer, name) for name in names} | SIZES
    options |= {"num_labels": 1} if head == "SequenceClassification" else {}
    options |= {"vocab_size": len(tokenizer)} | family.sizes
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.kind, **options)
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)  # as the family's
    for name in ("is_local", "local_files_only"):  # own class writes it, without what
        tokenizer.init_kwargs.pop(name, None)  # it notes about this loading
    tokenizer.save_pretrained(folder)
    if head == "CausalLM":  # by hand, as save_pretrained() refuses what some real hold
        found, ends = dict(family.generation), tokenizer.eos_token_id
        if "ends" in found:  # so many of them are named there
            ends = family.ids(family.ends)[: found.pop("ends")]
        found = json.dumps({"eos_token_id": ends} | found)
        Path(folder, "generation_config.json").write_text(found)
