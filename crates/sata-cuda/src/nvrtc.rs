//! NVIDIA's run-time compiler, found and loaded when it is first needed.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use crate::{Error, Unit};

/// What compiling gave: machine code for one architecture, and the compiler's remarks.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// An ELF file, as the driver loads it.
    pub cubin: Vec<u8>,
    /// What the compiler said.
    pub log: String,
}

type Program = *mut c_void;
type Status = c_int;

/// The library's functions.
#[derive(Debug)]
pub struct Nvrtc {
    version: (u32, u32),
    path: String,
    functions: Functions,
    /// Held so that the functions stay.
    _libraries: Vec<Library>,
}

#[derive(Debug)]
#[allow(clippy::type_complexity)]
struct Functions {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    log: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    explain: unsafe extern "C" fn(Status) -> *const c_char,
}

impl Nvrtc {
    /// The library, loaded once: the file or folder that `SATA_NVRTC` names, else what the loader
    /// finds, else those of the usual places of CUDA and of the active Python environment.
    ///
    /// # Errors
    /// [`Error::NoCompiler`] with what was tried.
    pub fn get() -> Result<&'static Self, Error> {
        static NVRTC: OnceLock<Result<Nvrtc, String>> = OnceLock::new();
        let found = NVRTC.get_or_init(|| {
            let mut tried = vec![];
            for candidate in candidates() {
                match Self::load(&candidate) {
                    Ok(nvrtc) => return Ok(nvrtc),
                    Err(error) => tried.push(error),
                }
            }
            Err(tried.join("; "))
        });
        found.as_ref().map_err(|reason| Error::NoCompiler { reason: reason.clone() })
    }

    fn load(path: &Path) -> Result<Self, String> {
        let mut libraries = vec![];
        // Its other half is looked for by the loader, which does not know this folder.
        for builtins in beside(path, "libnvrtc-builtins") {
            // SAFETY: NVIDIA's library, which only registers itself when it is loaded.
            libraries.extend(unsafe { Library::new(builtins) });
        }
        // SAFETY: as above.
        let library =
            unsafe { Library::new(path) }.map_err(|e| format!("{}: {e}", path.display()))?;
        let functions = Functions {
            create: symbol(&library, c"nvrtcCreateProgram")?,
            compile: symbol(&library, c"nvrtcCompileProgram")?,
            log_size: symbol(&library, c"nvrtcGetProgramLogSize")?,
            log: symbol(&library, c"nvrtcGetProgramLog")?,
            cubin_size: symbol(&library, c"nvrtcGetCUBINSize")?,
            cubin: symbol(&library, c"nvrtcGetCUBIN")?,
            destroy: symbol(&library, c"nvrtcDestroyProgram")?,
            explain: symbol(&library, c"nvrtcGetErrorString")?,
        };
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status =
            symbol(&library, c"nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: takes two places for numbers.
        if unsafe { version(&mut major, &mut minor) } != 0 {
            return Err(format!("{}: it does not tell its version", path.display()));
        }
        libraries.push(library);
        Ok(Nvrtc {
            version: (major.unsigned_abs(), minor.unsigned_abs()),
            path: path.display().to_string(),
            functions,
            _libraries: libraries,
        })
    }

    /// Its version, such as (13, 0).
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Where it was loaded from.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The options that `unit` is compiled with for `arch`.
    pub(crate) fn options(unit: &Unit, arch: &str) -> Vec<String> {
        let mut options = vec![
            format!("--gpu-architecture={arch}"),
            "--std=c++17".to_string(),
            // So that lambdas and constexpr functions need no marks.
            "--device-as-default-execution-space".to_string(),
        ];
        options.extend(unit.options().iter().map(|option| option.to_string()));
        options
    }

    /// Compiles `unit` for `arch` (such as `sm_90a`), which needs no GPU. `verbose` makes the log
    /// tell each kernel's registers and spills.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's log.
    pub fn compile(&self, unit: &Unit, arch: &str, verbose: bool) -> Result<Compiled, Error> {
        let failed =
            |log: String| Error::Compile { kernel: unit.title(), arch: arch.to_string(), log };
        let c_string = |text: &str| CString::new(text).map_err(|e| failed(e.to_string()));
        let text = c_string(&unit.full_text())?;
        let name = c_string(unit.file())?;
        let mut options = Self::options(unit, arch);
        if verbose {
            options.push("--ptxas-options=-v".into());
        }
        let options =
            options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = Owned { program: std::ptr::null_mut(), destroy: self.functions.destroy };
        let f = &self.functions;
        // SAFETY: the texts are C strings that outlive the program; there are no headers.
        let status = unsafe {
            (f.create)(
                &mut program.program,
                text.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        self.check(status).map_err(failed)?;
        // SAFETY: the program was just made, and there are as many options as are said.
        let status =
            unsafe { (f.compile)(program.program, options.len() as c_int, options.as_ptr()) };
        let log = self.bytes(program.program, f.log_size, f.log).map_err(failed)?;
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_string();
        self.check(status).map_err(|reason| failed(format!("{reason}\n{log}")))?;
        let cubin = self.bytes(program.program, f.cubin_size, f.cubin).map_err(failed)?;
        if cubin.is_empty() {
            return Err(failed("the compiler gave no machine code".into()));
        }
        Ok(Compiled { cubin, log })
    }

    fn bytes(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> Status,
        get: unsafe extern "C" fn(Program, *mut c_char) -> Status,
    ) -> Result<Vec<u8>, String> {
        let mut len = 0;
        // SAFETY: a program that was made, and a place for a number.
        self.check(unsafe { size(program, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: room for as many bytes as the library asked for.
        self.check(unsafe { get(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn check(&self, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: gives a static string for any number.
        let text = unsafe { (self.functions.explain)(status) };
        if text.is_null() {
            return Err(format!("error {status}"));
        }
        // SAFETY: a C string, as above.
        Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }
}

/// A program that is given back.
struct Owned {
    program: Program,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: it was made and not yet given back.
            unsafe { (self.destroy)(&mut self.program) };
        }
    }
}

fn symbol<T: Copy>(library: &Library, name: &CStr) -> Result<T, String> {
    // SAFETY: `T` is the type that NVIDIA documents for the function of this name.
    let symbol = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    symbol.map(|symbol| *symbol).map_err(|e| e.to_string())
}

/// Where the library may be.
fn candidates() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("SATA_NVRTC").filter(|named| !named.is_empty()) {
        let named = PathBuf::from(named);
        return if named.is_dir() {
            let inside = in_folder(&named);
            if inside.is_empty() { vec![named.join("libnvrtc.so")] } else { inside }
        } else {
            vec![named]
        };
    }
    if cfg!(windows) {
        return ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"].map(PathBuf::from).to_vec();
    }
    let mut all: Vec<PathBuf> =
        ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from).to_vec();
    for root in ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT"] {
        if let Some(root) = std::env::var_os(root) {
            all.extend(in_folder(&Path::new(&root).join("lib64")));
            all.extend(in_folder(&Path::new(&root).join("lib")));
        }
    }
    all.extend(in_folder(Path::new("/usr/local/cuda/lib64")));
    for environment in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let Some(root) = std::env::var_os(environment) else {
            continue;
        };
        all.extend(in_folder(&Path::new(&root).join("lib")));
        for python in names_with(&Path::new(&root).join("lib"), "python3") {
            let nvidia = python.join("site-packages").join("nvidia");
            all.extend(in_folder(&nvidia.join("cu13").join("lib")));
            all.extend(in_folder(&nvidia.join("cuda_nvrtc").join("lib")));
        }
    }
    all
}

/// Files of the compiler itself in a folder, the newest version first.
fn in_folder(folder: &Path) -> Vec<PathBuf> {
    let mut found = names_with(folder, "libnvrtc.so");
    found.reverse();
    found
}

/// Files beside `path` whose names begin so.
fn beside(path: &Path, prefix: &str) -> Vec<PathBuf> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => names_with(folder, prefix),
        _ => vec![],
    }
}

fn names_with(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return vec![];
    };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}
