// The C++ objects that Python holds.
#pragma once

#include <tvm/ffi/object.h>

#include <memory>
#include <mutex>
#include <utility>

#include "clusterfusion/engine.hpp"
#include "clusterfusion/generation_feed.hpp"
#include "clusterfusion/tokenizer.hpp"

// The core is compiled with another version of dlpack.h than this extension. What both use,
// DLTensor by pointer and value, must lie the same way in memory.
static_assert(DLPACK_MAJOR_VERSION >= 1, "the dlpack.h of apache-tvm-ffi must be found first");
static_assert(sizeof(DLTensor) == 48 && offsetof(DLTensor, device) == 8 &&
              offsetof(DLTensor, ndim) == 16 && offsetof(DLTensor, dtype) == 20 &&
              offsetof(DLTensor, shape) == 24 && offsetof(DLTensor, strides) == 32 &&
              offsetof(DLTensor, byte_offset) == 40 && sizeof(DLDeviceType) == 4);

namespace clusterfusion::python {

namespace ffi = tvm::ffi;

class TokenizerObj : public ffi::Object {
 public:
  explicit TokenizerObj(std::shared_ptr<const Tokenizer> tokenizer)
      : tokenizer(std::move(tokenizer)) {}
  const std::shared_ptr<const Tokenizer> tokenizer;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("clusterfusion.TokenizerHandle", TokenizerObj, ffi::Object);
};

class TokenizerRef : public ffi::ObjectRef {
 public:
  explicit TokenizerRef(ffi::ObjectPtr<TokenizerObj> data) : ObjectRef(std::move(data)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(TokenizerRef, ffi::ObjectRef, TokenizerObj);
};

class EngineObj : public ffi::Object {
 public:
  explicit EngineObj(std::unique_ptr<Engine> engine) : engine(std::move(engine)) {}
  const std::unique_ptr<Engine> engine;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("clusterfusion.EngineHandle", EngineObj, ffi::Object);
};

class EngineRef : public ffi::ObjectRef {
 public:
  explicit EngineRef(ffi::ObjectPtr<EngineObj> data) : ObjectRef(std::move(data)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(EngineRef, ffi::ObjectRef, EngineObj);
};

class GenerationObj : public ffi::Object {
 public:
  GenerationObj(EngineRef engine, std::unique_ptr<Generation> generation)
      : engine(std::move(engine)), generation(std::move(generation)) {}
  const EngineRef engine;  // declared first: it must outlive the generation
  const std::unique_ptr<Generation> generation;
  mutable std::mutex mutex;  // Python threads may share a generation; the GIL does not guard it

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("clusterfusion.GenerationHandle", GenerationObj, ffi::Object);
};

class GenerationRef : public ffi::ObjectRef {
 public:
  explicit GenerationRef(ffi::ObjectPtr<GenerationObj> data) : ObjectRef(std::move(data)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(GenerationRef, ffi::ObjectRef, GenerationObj);
};

class FeedObj : public ffi::Object {
 public:
  FeedObj(EngineRef engine, std::function<void()> wake)
      : engine(std::move(engine)), feed(*this->engine->engine, std::move(wake)) {}
  const EngineRef engine;  // declared first: it must outlive the feed
  mutable GenerationFeed feed;

  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("clusterfusion.FeedHandle", FeedObj, ffi::Object);
};

class FeedRef : public ffi::ObjectRef {
 public:
  explicit FeedRef(ffi::ObjectPtr<FeedObj> data) : ObjectRef(std::move(data)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(FeedRef, ffi::ObjectRef, FeedObj);
};

}  // namespace clusterfusion::python
