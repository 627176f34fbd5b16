import PhiBundle

#if canImport(llama)
    internal import llama
#else
    internal import CLlama
#endif

/// Types of the KV cache in llama.cpp that a phone has a use for.
public enum CacheType: String, Sendable, CaseIterable {
    case f16
    case q8_0
    case q4_0
}

/// A GGUF file on llama.cpp.
final class LlamaBackend: Backend {
    let vocabularySize: Int
    let context: Int
    private(set) var tokens: [Int] = []

    private let path: String
    private let threads: Int32
    private let cache: CacheType
    private let crossover: Int?
    private let model: OpaquePointer
    private var state: OpaquePointer?
    private var reserved = 0
    private var held = 0  // of the tokens, how many the cache holds
    private var batch: llama_batch

    var position: Int { tokens.count }

    init(path: String, context: Int, threads: Int, cache: CacheType, crossover: Int?, cancellation: Cancellation? = nil)
        throws(PhiError)
    {
        self.path = path
        self.context = context
        self.threads = Int32(threads)
        self.cache = cache
        // llama.cpp chooses LongRoPE's factors by the context that is reserved, not by the text's length: a text that
        // crosses over is read again in a context of the other size.
        self.crossover = crossover.flatMap { $0 < context ? $0 : nil }
        llama_log_set({ _, _, _ in }, nil)
        llama_backend_init()
        var settings = llama_model_default_params()
        #if os(Linux)
            // GCC before 13 drops stores that ggml's AMX kernels need (ggml-org/llama.cpp#20824). Elsewhere weights are
            // laid out anew for the processor: mapping the file as well would hold the model twice.
            if String(cString: llama_print_system_info()).contains("AMX_INT8 = 1") {
                settings.use_extra_bufts = false
            } else {
                settings.load_mode = LLAMA_LOAD_MODE_NONE
            }
        #endif
        if let cancellation {
            settings.progress_callback = { _, given in
                guard let given else { return true }
                return !Unmanaged<Cancellation>.fromOpaque(given).takeUnretainedValue().isCancelled
            }
            settings.progress_callback_user_data = Unmanaged.passUnretained(cancellation).toOpaque()
        }
        guard let model = llama_model_load_from_file(path, settings) else {
            if cancellation?.isCancelled ?? false { throw PhiError(.stopped, "\(path): loading was stopped") }
            throw PhiError(.bundle, "\(path): llama.cpp cannot load it; export it again")
        }
        self.model = model
        vocabularySize = Int(llama_vocab_n_tokens(llama_model_get_vocab(model)))
        batch = llama_batch_init(Int32(Engine.chunk), 0, 1)
        try reserve(needed(0))
    }

    deinit {
        llama_batch_free(batch)
        if let state { llama_free(state) }
        llama_model_free(model)
    }

    func forward(_ more: [Int], allLogits: Bool) throws(PhiError) -> [[Float]] {
        let text = tokens + more
        if needed(text.count) != reserved { try reserve(needed(text.count)) }
        let wanted = allLogits ? tokens.count : text.count - 1
        var rows: [[Float]] = []
        var start = held
        while start < text.count {
            let end = min(start + Engine.chunk, text.count)
            rows += try decode(text[start..<end], wanted: wanted)
            start = end
        }
        tokens = text
        held = text.count
        return rows
    }

    func trim(_ position: Int) {
        tokens = Array(tokens.prefix(position))
        held = min(held, position)
        if let state { _ = llama_memory_seq_rm(llama_get_memory(state), 0, Int32(position), -1) }
    }

    func reset() throws(PhiError) {
        tokens = []
        try reserve(needed(0))
    }

    /// The logits after each token from position `wanted` on.
    private func decode(_ piece: ArraySlice<Int>, wanted: Int) throws(PhiError) -> [[Float]] {
        guard let state else { throw PhiError(.context, "the context is gone; load the model again") }
        batch.n_tokens = Int32(piece.count)
        for (i, token) in piece.enumerated() {
            batch.token[i] = Int32(token)
            batch.pos[i] = Int32(piece.startIndex + i)
            batch.n_seq_id[i] = 1
            batch.seq_id[i]?[0] = 0
            batch.logits[i] = piece.startIndex + i >= wanted ? 1 : 0
        }
        let status = llama_decode(state, batch)
        guard status == 0 else {
            throw PhiError(.context, "llama.cpp could not decode at position \(piece.startIndex) (status \(status))")
        }
        var rows: [[Float]] = []
        for i in max(0, wanted - piece.startIndex)..<max(piece.count, wanted - piece.startIndex) {
            guard let logits = llama_get_logits_ith(state, Int32(i)) else {
                throw PhiError(.context, "llama.cpp gave no logits at position \(piece.startIndex + i)")
            }
            rows.append(Array(UnsafeBufferPointer(start: logits, count: vocabularySize)))
        }
        return rows
    }

    private func needed(_ total: Int) -> Int {
        guard let crossover, total <= crossover else { return context }
        return crossover
    }

    private func reserve(_ slots: Int) throws(PhiError) {
        if let state { llama_free(state) }
        state = nil
        held = 0
        var settings = llama_context_default_params()
        settings.n_ctx = UInt32(slots)
        settings.n_seq_max = 1
        settings.n_batch = UInt32(min(slots, Engine.chunk))
        settings.n_ubatch = settings.n_batch
        settings.n_threads = threads
        settings.n_threads_batch = threads
        switch cache {
        case .f16: (settings.type_k, settings.type_v) = (GGML_TYPE_F16, GGML_TYPE_F16)
        case .q8_0: (settings.type_k, settings.type_v) = (GGML_TYPE_Q8_0, GGML_TYPE_Q8_0)
        case .q4_0: (settings.type_k, settings.type_v) = (GGML_TYPE_Q4_0, GGML_TYPE_Q4_0)
        }
        #if os(Linux)
            // Flash attention on processors is slower behind a long text; only a cache of few bits cannot do without.
            if cache == .f16 { settings.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED }
        #endif
        guard let made = llama_init_from_model(model, settings) else {
            throw PhiError(.context, "\(path): llama.cpp cannot reserve \(slots) tokens; ask for fewer")
        }
        state = made
        reserved = slots
    }
}
