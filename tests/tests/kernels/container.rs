//! The container image, run by an OCI runtime without an engine: nothing writable but its state and its
//! runtime directory, with just the capabilities that docs/install.md names.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use lab::site::{self, Arms, Client, SERVER, Site};
use lab::{Host, Process, http, wait_until};
use serde_json::{Value, json};

use super::*;

const HTTP: u16 = 80;

/// What the router needs of root's rights, as docs/install.md says.
const CAPABILITIES: [&str; 3] = ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"];

#[test]
fn the_image_runs_read_only_and_stops_by_its_signal() {
    let found = packages().and_then(|packages| {
        let crun = lab::requirements::find("crun");
        crun.map(|_| packages)
            .ok_or_else(|| "crun is not installed; `cargo xtask setup --kernels` brings it".into())
    });
    match found {
        Ok(packages) => lab::test(|lab| the_image(lab, &packages.join("image.tar"))),
        Err(reason) => eprintln!("skipped: {reason}"),
    }
}

fn the_image(lab: &Lab, archive: &Path) -> anyhow::Result<()> {
    let site = Site::new(lab, Arms::One)?;
    let router = &site.router;
    let image = Image::unpack(router, archive)?;
    let client = Client::new("laptop", 2)?;
    let config = site::config(&[&client], "ebpf", true)?;
    let state = router.folder().join("state");
    let socket = state.join("api.sock");
    for (path, text) in [
        ("etc/private.key", config.key.private.clone()),
        (
            "etc/sluice.toml",
            config.to_toml(
                "contained",
                Path::new("/etc/sluice/private.key"),
                Path::new("/var/lib/sluice/api.sock"),
            )?,
        ),
    ] {
        let path = router.folder().join(path);
        fs::create_dir_all(path.parent().context("no folder")?)?;
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    }
    fs::create_dir_all(&state)?;

    let mut contained = image.run(router, &state)?;
    contained.ready(START, "the container to settle", || {
        let status = http::get_local(&socket, "/status").ok();
        let status = status.and_then(|text| serde_json::from_slice::<Value>(&text).ok());
        status.is_some_and(|status| {
            status["datapath"]["active"] == "ebpf" && status["problems"] == json!([])
        })
    })?;
    let _server = site.server.http_server(HTTP)?;
    let _tunnel = client.connect(&site.laptop, &config.key)?;
    for server in SERVER {
        let web = SocketAddr::new(server, HTTP);
        ensure!(http::get(&site.laptop, web, "/")? == http::GREETING.as_bytes());
    }
    // Its root cannot be written to, and nothing has been written beside its state.
    let written: Vec<PathBuf> = ["tmp", "var/lib/sluice", "run", "etc/sluice"]
        .into_iter()
        .map(|folder| image.root.join(folder))
        .filter(|folder| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.filter(|entry| !entry.path().is_dir()).count() > 0
        })
        .collect();
    ensure!(written.is_empty(), "written: {written:?}");

    ensure!(image.stop_signal() == "SIGTERM", "{}", image.stop_signal());
    image.kill(router)?;
    let ended = contained.wait(QUICK)?;
    ensure!(ended.success(), "{ended}\n{}", contained.log());
    wait_until(QUICK, "the tunnel to go", || {
        router.ip("link show sluice0").is_err()
    })?;
    ensure!(router.run(["nft", "list", "ruleset"])?.trim().is_empty());
    Ok(())
}

/// An unpacked image, as a bundle of the OCI runtime specification.
struct Image {
    bundle: PathBuf,
    root: PathBuf,
    config: Value,
    /// Unique on this machine.
    name: String,
}

impl Image {
    /// Unpacks the image for this processor out of an archive in OCI's image layout, and looks at every
    /// digest.
    fn unpack(host: &Host, archive: &Path) -> anyhow::Result<Self> {
        let (layout, bundle) = (host.folder().join("layout"), host.folder().join("bundle"));
        let root = bundle.join("rootfs");
        fs::create_dir_all(&layout)?;
        fs::create_dir_all(&root)?;
        let path = |path: &Path| path.display().to_string();
        let members = host.run(["tar", "-tf", &path(archive)])?;
        ensure!(!members.contains("./"), "members begin with ./: {members}");
        host.run(["tar", "-xf", &path(archive), "-C", &path(&layout)])?;
        let version: Value = serde_json::from_slice(&fs::read(layout.join("oci-layout"))?)?;
        ensure!(version["imageLayoutVersion"] == "1.0.0", "{version}");
        let blob = |descriptor: &Value| -> anyhow::Result<PathBuf> {
            let digest = descriptor["digest"].as_str().context("no digest")?;
            let hex = digest.strip_prefix("sha256:").context("another digest")?;
            let file = layout.join("blobs/sha256").join(hex);
            let sum = host.run(["sha256sum", &path(&file)])?;
            ensure!(sum.starts_with(hex), "{digest} is {sum}");
            let size = fs::metadata(&file)?.len();
            ensure!(descriptor["size"] == size, "{descriptor}: {size} bytes");
            Ok(file)
        };
        let read = |file: PathBuf| -> anyhow::Result<Value> {
            Ok(serde_json::from_slice(&fs::read(file)?)?)
        };
        let index = read(layout.join("index.json"))?;
        let own = match std::env::consts::ARCH {
            "aarch64" => "arm64",
            _ => "amd64",
        };
        let manifests = index["manifests"].as_array().context("no manifests")?;
        let manifest = manifests
            .iter()
            .find(|manifest| manifest["platform"]["architecture"] == own)
            .context("not for this processor")?;
        let manifest = read(blob(manifest)?)?;
        let config = read(blob(&manifest["config"])?)?;
        for layer in manifest["layers"].as_array().context("no layers")? {
            host.run(["tar", "-xzf", &path(&blob(layer)?), "-C", &path(&root)])?;
        }
        let name = format!("{}-{}", host.namespace(), std::process::id());
        Ok(Self {
            bundle,
            root,
            config,
            name,
        })
    }

    fn stop_signal(&self) -> &str {
        self.config["config"]["StopSignal"].as_str().unwrap_or("")
    }

    /// Runs it in the network of `host`, with the configuration in its folder `etc`.
    fn run(&self, host: &Host, state: &Path) -> anyhow::Result<Process> {
        let config = &self.config["config"];
        let words = |key: &str| config[key].as_array().cloned().unwrap_or_default();
        let args = [words("Entrypoint"), words("Cmd")].concat();
        let bind = |from: &Path, to: &str, access: &str| json!({ "destination": to, "type": "none", "source": from, "options": ["rbind", access] });
        let etc = host.folder().join("etc");
        let mounts = json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro", "nosuid"] },
            bind(&etc, "/etc/sluice", "ro"),
            bind(state, "/var/lib/sluice", "rw"),
            bind(host.bpffs()?, "/sys/fs/bpf", "rw"),
            bind(Path::new("/dev/net/tun"), "/dev/net/tun", "rw"),
        ]);
        let sets = ["bounding", "effective", "permitted"];
        let capabilities = sets.map(|set| (set.to_owned(), json!(CAPABILITIES)));
        let bundle = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "cwd": config["WorkingDir"],
                "args": args,
                "env": words("Env"),
                "capabilities": serde_json::Map::from_iter(capabilities),
                "noNewPrivileges": true,
            },
            "root": { "path": "rootfs", "readonly": true },
            "mounts": mounts,
            "linux": { "namespaces": [{ "type": "mount" }, { "type": "pid" }] },
        });
        fs::write(self.bundle.join("config.json"), bundle.to_string())?;
        let crun = self.crun(host, &["run", "--bundle"]);
        let crun = crun.arg(&self.bundle).arg(&self.name);
        host.spawn("crun", crun)
    }

    /// Has the runtime send it the signal by which it is stopped.
    fn kill(&self, host: &Host) -> anyhow::Result<()> {
        let crun = self.crun(host, &["kill", &self.name, self.stop_signal()]);
        crun.run().map(drop)
    }

    /// The runtime, without control groups, which this machine may not let a test make. It looks for their
    /// file system all the same.
    fn crun(&self, host: &Host, words: &[&str]) -> lab::Cmd {
        const WITH_GROUPS: &str = r#"mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec crun --cgroup-manager=disabled "$@""#;
        host.command([
            "unshare",
            "--mount",
            "sh",
            "-c",
            WITH_GROUPS,
            "sh",
            "--root",
        ])
        .arg(host.folder().join("crun"))
        .args(words)
    }
}
