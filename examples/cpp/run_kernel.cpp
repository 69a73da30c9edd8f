// SPDX-License-Identifier: Apache-2.0
// A kernel of a pack, called from C++ through tvm-ffi: no Python, no compiler, no copy of the data.
//
//     run_kernel DIRECTORY HEIGHT WIDTH [FILE]
//
// DIRECTORY is one of a pack's kernels (kernel.so and manifest.json): a layer of float32 in NCHW. The program makes
// one image of HEIGHT x WIDTH and a weight from small fractions, so that anybody can make the same, computes the
// layer, and prints some of the result; FILE gets all of it, as float32 values.
//
// It trusts what it is given: loading kernel.so runs its code. tvmdcn.packs.check compares digests beforehand.

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
using ffi::json::Array;
using ffi::json::Object;

// What the manifest says of a layer and of how its kernel is called.
struct Layer {
  int64_t in_channels, out_channels, groups, offset_groups, granule, max_tile_units;
  std::vector<int64_t> kernel_size, stride, padding, dilation, packed_shape;
  bool mask;
  std::string entry, pack;

  int64_t taps() const { return kernel_size[0] * kernel_size[1]; }

  // Pixels along an axis of the output: 0 is vertical, 1 horizontal.
  int64_t output_size(int axis, int64_t size) const {
    int64_t padded = size + padding[axis] + padding[axis + 2];  // top, left, bottom, right
    return (padded - dilation[axis] * (kernel_size[axis] - 1) - 1) / stride[axis] + 1;
  }
};

static std::vector<int64_t> integers(const ffi::Any& value) {
  std::vector<int64_t> found;
  for (const ffi::Any& item : value.cast<Array>()) found.push_back(item.cast<int64_t>());
  return found;
}

static Layer read_layer(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Object manifest = ffi::json::Parse(text).cast<Object>();
  Object spec = manifest["key"].cast<Object>()["spec"].cast<Object>();
  Object kernel = manifest["kernel"].cast<Object>();
  if (manifest["schema"].cast<int64_t>() != 2 || manifest["key"].cast<Object>()["abi"].cast<int64_t>() != 2)
    throw std::runtime_error(path + " is of another version than this program was written for");
  auto is = [](const ffi::Any& value, const char* expected) { return value.cast<ffi::String>() == expected; };
  if (!is(spec["operator"], "deform_conv2d") || !is(spec["dtype"], "float32") || !is(spec["layout"], "NCHW"))
    throw std::runtime_error(path + " is not of a layer of float32 in NCHW");
  return Layer{spec["in_channels"].cast<int64_t>(),
               spec["out_channels"].cast<int64_t>(),
               spec["groups"].cast<int64_t>(),
               spec["offset_groups"].cast<int64_t>(),
               kernel["granule"].cast<int64_t>(),
               kernel["max_tile_units"].cast<int64_t>(),
               integers(spec["kernel_size"]),
               integers(spec["stride"]),
               integers(spec["padding"]),
               integers(spec["dilation"]),
               integers(kernel["packed_shape"]),
               spec["mask"].cast<bool>(),
               kernel["entry"].cast<ffi::String>(),
               kernel["pack"].cast<ffi::String>()};
}

// A view of float32 memory, which stays the caller's.
class View {
 public:
  View(float* data, std::vector<int64_t> shape) : shape_(std::move(shape)), strides_(shape_.size()) {
    int64_t step = 1;
    for (size_t axis = shape_.size(); axis-- > 0; step *= shape_[axis]) strides_[axis] = step;
    tensor_ = DLTensor{data, {kDLCPU, 0}, static_cast<int32_t>(shape_.size()), {kDLFloat, 32, 1}, shape_.data(),
                       strides_.data(), 0};
  }
  View(const View&) = delete;
  DLTensor* get() { return &tensor_; }

 private:
  std::vector<int64_t> shape_, strides_;
  DLTensor tensor_;
};

// Fractions from -1 to 1 that look random: (a * i + b) mod 101, in fiftieths.
static std::vector<float> fractions(int64_t count, int64_t a, int64_t b) {
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>((a * i + b) % 101 - 50) / 50.0f;
  return values;
}

static int run(const std::string& directory, int64_t height, int64_t width, const char* output_file) {
  Layer layer = read_layer(directory + "/manifest.json");
  const int64_t taps = layer.taps(), pixels_in = height * width;
  const int64_t out_height = layer.output_size(0, height), out_width = layer.output_size(1, width);
  const int64_t pixels = out_height * out_width;
  if (out_height < 1 || out_width < 1 || pixels < layer.granule)
    throw std::runtime_error("this image is too small: the kernel computes at least " +
                             std::to_string(layer.granule) + " pixels of output");

  // An absolute path, as tvm-ffi wants it.
  std::unique_ptr<char, decltype(&std::free)> library(realpath((directory + "/kernel.so").c_str(), nullptr), &std::free);
  if (!library) throw std::runtime_error("there is no kernel.so in " + directory);
  ffi::Module module = ffi::Module::LoadFromFile(library.get());
  ffi::Function compute = module->GetFunction(layer.entry).value();
  ffi::Function pack_weight = module->GetFunction(layer.pack).value();

  std::vector<float> input = fractions(layer.in_channels * pixels_in, 37, 11);
  std::vector<float> offset = fractions(layer.offset_groups * 2 * taps * pixels, 29, 5);
  std::vector<float> mask = fractions(layer.offset_groups * taps * pixels, 53, 3);
  std::vector<float> weight = fractions(layer.out_channels * layer.in_channels / layer.groups * taps, 41, 7);
  std::vector<float> bias = fractions(layer.out_channels, 19, 13);
  std::vector<float> output(layer.out_channels * pixels);

  // The weight in the order in which the kernel reads it, at a multiple of 64 bytes: once for many calls.
  size_t packed_bytes = sizeof(float);
  for (int64_t size : layer.packed_shape) packed_bytes *= size;
  std::unique_ptr<float, decltype(&std::free)> packed(
      static_cast<float*>(std::aligned_alloc(64, (packed_bytes + 63) / 64 * 64)), &std::free);
  if (!packed) throw std::bad_alloc();
  View weight_rows(weight.data(), {layer.out_channels, layer.in_channels / layer.groups * taps});
  View packed_view(packed.get(), layer.packed_shape);
  pack_weight(weight_rows.get(), packed_view.get());

  // Images are [N, channels, pixels]. The pixels are cut into tiles of whole units of `granule`, tasks of the threads.
  const int64_t batch = 1, units = (pixels + layer.granule - 1) / layer.granule;
  const int64_t tile_units = std::min(layer.max_tile_units, units), tiles = (units + tile_units - 1) / tile_units;
  View input_view(input.data(), {batch, layer.in_channels, pixels_in});
  View offset_view(offset.data(), {batch, layer.offset_groups * 2 * taps, pixels});
  View mask_view(mask.data(), {batch, layer.offset_groups * taps, pixels});
  View bias_view(bias.data(), {layer.out_channels});
  View output_view(output.data(), {batch, layer.out_channels, pixels});
  // In the order of the manifest's operator: input, offset, mask where there is one, weight, bias, output, sizes.
  std::vector<ffi::AnyView> arguments{input_view.get(), offset_view.get()};
  if (layer.mask) arguments.push_back(mask_view.get());
  for (View* view : {&packed_view, &bias_view, &output_view}) arguments.push_back(view->get());
  for (int64_t size : {height, width, out_width, batch * tiles, tiles, tile_units}) arguments.push_back(size);
  ffi::Any result;
  compute.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);

  std::printf("output of %lld x %lld x %lld:", static_cast<long long>(layer.out_channels),
              static_cast<long long>(out_height), static_cast<long long>(out_width));
  for (size_t i = 0; i < std::min<size_t>(output.size(), 4); ++i) std::printf(" %.7g", output[i]);
  std::printf(" ...\n");
  if (output_file != nullptr) {
    std::ofstream file(output_file, std::ios::binary);
    file.write(reinterpret_cast<const char*>(output.data()), output.size() * sizeof(float));
    if (!file.flush()) throw std::runtime_error(std::string("cannot write ") + output_file);
  }
  return 0;
}

int main(int argc, char** argv) {
  if (argc < 4 || argc > 5) {
    std::fprintf(stderr, "usage: %s DIRECTORY HEIGHT WIDTH [FILE]\n", argv[0]);
    return 2;
  }
  try {
    return run(argv[1], std::atoll(argv[2]), std::atoll(argv[3]), argc == 5 ? argv[4] : nullptr);
  } catch (const ffi::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}
