import type {
  Message,
  PreTrainedModel,
  PreTrainedTokenizer,
  PretrainedModelOptions,
  TextGenerationPipeline,
} from "@huggingface/transformers";

/** The model: `generate` is the library's. */
export declare class RecurrentGemmaForCausalLM extends PreTrainedModel {
  /** Tokens that were read so far, of prompts and of replies. */
  tokensRead: number;
  /** The vocabulary; without it, a reply that is not spelled as the tokenizer would is read again. */
  tokenizer: PreTrainedTokenizer | null;
  /** Computes the next logits; the library calls it for each token. */
  _forward: (...inputs: unknown[]) => Promise<unknown>;
  /** Forgets all texts. */
  forget(): Promise<void>;
  /** The state after the last text, as a safetensors file. */
  saveState(options?: { messages?: Message[]; precision?: "fp32" | "fp16" }): Promise<Uint8Array>;
  /** Remembers the text of a state file; returns what the state has seen. */
  loadState(file: ArrayBuffer | Uint8Array): Promise<{ ids: bigint[]; messages: Message[] | null }>;
}

export type TextGeneration = TextGenerationPipeline & { model: RecurrentGemmaForCausalLM };

/** The library's text generation pipeline for an artifact: a folder, an address, a name on the hub. */
export declare function textGeneration(
  model: string,
  options?: PretrainedModelOptions,
): Promise<TextGeneration>;

/** Makes the library's own `pipeline` load artifacts. */
export declare function register(): void;
