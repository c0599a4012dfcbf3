// Makes one call of the native library from a file, and writes what became of its memory back: see emulated.py.
//
// The file: the size of the structure and its bytes; the number of pieces of memory, each with its size and bytes; the number
// of pointers, each with its place in the structure, the piece that it points to and how far into it. All numbers int64.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <vector>

int main(int argc, char** argv) {
    if (argc != 4) return 10;
    void* library = dlopen(argv[1], RTLD_NOW);
    auto* function = library ? (int64_t (*)(void*))dlsym(library, argv[2]) : nullptr;
    FILE* file = std::fopen(argv[3], "r+b");
    if (!function || !file) return 11;
    const auto number = [&] {
        int64_t value = 0;
        if (std::fread(&value, sizeof value, 1, file) != 1) std::exit(12);
        return value;
    };
    const auto bytes = [&](int64_t size) {
        std::vector<char> read(size + 64);
        if (std::fread(read.data(), 1, size, file) != (size_t)size) std::exit(13);
        return read;
    };
    const int64_t size = number();
    std::vector<char> call = bytes(size);
    std::vector<std::vector<char>> pieces;
    std::vector<int64_t> sizes, places;
    for (int64_t left = number(); left > 0; --left) {
        sizes.push_back(number());
        places.push_back(std::ftell(file));
        pieces.push_back(bytes(sizes.back()));
    }
    for (int64_t left = number(); left > 0; --left) {
        const int64_t place = number(), piece = number(), offset = number();
        char* target = pieces[piece].data() + offset;
        std::memcpy(call.data() + place, &target, sizeof target);
    }
    const int64_t result = function(call.data());
    for (size_t i = 0; i < pieces.size(); ++i) {
        std::fseek(file, places[i], SEEK_SET);
        std::fwrite(pieces[i].data(), 1, sizes[i], file);
    }
    std::fclose(file);
    return result == 0 ? 0 : 14;
}
